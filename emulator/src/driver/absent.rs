//! Functions that programs link against and that this driver does not have. Each says so and
//! fails: a program that only names them loads, one that calls them is told.

use super::{CUresult, E, enter, error};

macro_rules! absent {
    ($($what:literal: $($name:ident)*;)*) => {$($(
        #[doc = concat!("Refused: ", $what, " are not implemented.")]
        ///
        /// Its arguments are not read, so that it is declared without them: in C's calling
        /// convention they are the caller's affair.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> CUresult {
            enter(|| {
                let why = concat!(stringify!($name), ": ", $what, " are not implemented");
                Err(error::refuse(E::NotSupported, why))
            })
        }
    )*)*};
}

absent! {
    "arrays":
        cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuMemcpyAtoH_v2 cuMemcpyHtoA_v2;
    "textures and surfaces":
        cuSurfObjectCreate cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate
        cuTexObjectDestroy cuTexObjectGetResourceDesc cuTexObjectGetResourceViewDesc;
    "limits of contexts": cuCtxGetLimit;
    "external memories":
        cuImportExternalMemory cuDestroyExternalMemory cuExternalMemoryGetMappedBuffer;
    "nodes of graphs":
        cuGraphAddKernelNode cuGraphDebugDotPrint cuGraphGetEdges cuGraphGetNodes
        cuGraphKernelNodeGetParams cuGraphNodeGetType;
    "links of several modules": cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy;
    "managed allocations": cuMemAdvise cuMemAllocManaged cuMemPrefetchAsync;
}
