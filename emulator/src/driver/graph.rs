//! Graphs, and the memory that is allocated in them.
//!
//! An allocation that is captured has its address for good, but memory there only from the launch
//! that allocates it to the free, in the graph or after it. The memory is the host's under its own
//! address, which kernels reach while it is registered.

use super::{CUresult, E, Handle, State, Work, error, put, with, within};
use std::collections::HashSet;
use std::ffi::c_uint;

/// CUDA's flag: what the last launch left allocated is freed at the next.
const AUTO_FREE_ON_LAUNCH: u64 = 1;

/// A captured graph.
pub struct Graph {
    pub context: Handle,
    work: Vec<Work>,
}

/// A graph that can be launched.
pub struct Executable {
    pub context: Handle,
    graph: Handle,
    flags: u64,
    work: Vec<Work>,
}

/// Memory as CUDA aligns it.
#[derive(Clone, Copy)]
#[repr(align(256))]
struct Line(#[expect(dead_code)] [u8; 256]); // kernels and copies read it, by its address

/// An allocation in a graph.
pub struct GraphMemory {
    pub context: Handle,
    pub bytes: usize,
    /// Whether there is memory at its address now.
    pub live: bool,
    /// A graph frees it, so that nothing else may.
    freed_by_graph: bool,
    storage: Box<[Line]>,
}

impl State {
    /// The allocation of a graph that an address is in, allocated now or not.
    pub fn graph_memory_at(&self, address: u64) -> Option<&GraphMemory> {
        let (start, memory) = self.graph_memory.range(..=address).next_back()?;
        (address - start < memory.bytes as u64).then_some(memory)
    }

    /// Gives a capture an allocation of its own.
    pub fn reserve(&mut self, stream: Handle, bytes: usize) -> Result<u64, E> {
        let context = self.stream(stream)?.context;
        let left = self
            .device
            .config
            .memory
            .saturating_sub(self.device.memory().used());
        let lines = bytes.div_ceil(256);
        if bytes as u64 > left {
            return Err(error::refuse(
                E::OutOfMemory,
                format!("{bytes} bytes in a graph"),
            ));
        }
        let mut memory = GraphMemory {
            context,
            bytes,
            live: false,
            freed_by_graph: false,
            storage: vec![Line([0; 256]); lines].into_boxed_slice(),
        };
        let address = memory.storage.as_mut_ptr() as u64;
        self.submit(stream, Work::Alloc(address))?;
        self.graph_memory.insert(address, memory);
        Ok(address)
    }

    /// A launch gets to an allocation: its bytes hold nothing of use.
    pub fn allocate_in_graph(&mut self, address: u64) -> Result<(), E> {
        let memory = self.graph_memory.get_mut(&address).ok_or(E::InvalidValue)?;
        memory.storage.fill(Line([0xff; 256]));
        memory.live = true;
        let pointer = memory.storage.as_mut_ptr().cast();
        let bytes = memory.bytes;
        // SAFETY: the storage stays in `graph_memory` while it is live, and leaves the device
        // first when it is freed.
        unsafe { self.device.memory_mut().register_host(pointer, bytes) };
        Ok(())
    }

    /// Frees an allocation of a graph, in a launch or after it; `None` if it is no such address.
    pub fn free_in_graph(&mut self, address: u64) -> Option<Result<(), E>> {
        let memory = self.graph_memory.get_mut(&address)?;
        if !memory.live {
            let why = format!("free of {address:#x}, memory of a graph that is not allocated");
            return Some(Err(error::refuse(E::InvalidValue, why)));
        }
        memory.live = false;
        let pointer = memory.storage.as_mut_ptr().cast();
        self.device.memory_mut().unregister_host(pointer);
        Some(Ok(()))
    }

    /// Whether a graph's own free forbids this one.
    pub fn freed_by_graph(&self, address: u64) -> bool {
        self.graph_memory
            .get(&address)
            .is_some_and(|m| m.freed_by_graph)
    }

    /// A free that is captured must be of a graph's allocation, and the only one.
    pub fn capture_free(&mut self, stream: Handle, address: u64) -> Result<(), E> {
        match self.graph_memory.get_mut(&address) {
            Some(memory) if !memory.freed_by_graph => {
                self.submit(stream, Work::Free(address))?;
                // It was there, and work that is captured changes nothing.
                if let Some(memory) = self.graph_memory.get_mut(&address) {
                    memory.freed_by_graph = true;
                }
                Ok(())
            }
            _ => {
                let why = "a captured free must be of memory of a graph, once";
                match self.stream(stream)?.capture {
                    Some(id) => Err(self.spoil(id, E::InvalidValue, why)),
                    None => Err(E::InvalidValue),
                }
            }
        }
    }

    /// Work that will never run frees nothing.
    pub fn forget_frees(&mut self, work: &[Work]) {
        for item in work {
            if let Work::Free(address) = item
                && let Some(memory) = self.graph_memory.get_mut(address)
            {
                memory.freed_by_graph = false;
            }
        }
    }

    /// Drops the memory that no graph can allocate any more and nobody holds.
    pub fn sweep_graph_memory(&mut self) {
        let captures = self.captures.values().map(|c| c.work());
        let graphs = self.graphs.values().map(|g| &g.work[..]);
        let executables = self.executables.values().map(|e| &e.work[..]);
        let wanted: HashSet<u64> = captures
            .chain(graphs)
            .chain(executables)
            .flatten()
            .filter_map(allocated)
            .collect();
        self.graph_memory
            .retain(|address, memory| memory.live || wanted.contains(address));
    }

    pub fn add_graph(&mut self, context: Handle, work: Vec<Work>) -> Handle {
        let handle = self.handle();
        self.graphs.insert(handle, Graph { context, work });
        handle
    }

    fn launch_graph(&mut self, executable: Handle, stream: Handle) -> Result<(), E> {
        let it = self.executables.get(&executable).ok_or(E::InvalidHandle)?;
        let (context, work) = (it.context, it.work.clone());
        let auto_free = it.flags & AUTO_FREE_ON_LAUNCH != 0;
        if self.stream(stream)?.context != context {
            return Err(error::refuse(
                E::InvalidHandle,
                "the stream is of another context than the graph",
            ));
        }
        if let Some(id) = self.stream(stream)?.capture
            && work
                .iter()
                .any(|w| matches!(w, Work::Alloc(_) | Work::Free(_)))
        {
            let why = "a graph that allocates or frees cannot be part of another";
            return Err(self.spoil(id, E::NotSupported, why));
        }
        for address in work.iter().filter_map(allocated) {
            if self.graph_memory.get(&address).is_some_and(|m| m.live) {
                if !auto_free {
                    let why = format!(
                        "a graph is launched while {address:#x}, which it allocates, is not freed"
                    );
                    return Err(error::refuse(E::InvalidValue, why));
                }
                self.free_in_graph(address).unwrap_or(Ok(()))?;
            }
        }
        let captured = self.stream(stream)?.capture.is_some();
        for item in &work {
            if captured {
                self.submit(stream, item.clone())?;
            } else {
                self.perform(item, true)?;
            }
            if self.failed.is_some() {
                break;
            }
        }
        Ok(())
    }
}

fn allocated(work: &Work) -> Option<u64> {
    match work {
        Work::Alloc(address) => Some(*address),
        _ => None,
    }
}

/// # Safety
/// As in CUDA: `graph` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphCreate(graph: *mut Handle, _flags: c_uint) -> CUresult {
    within(|s, context| {
        let handle = s.add_graph(context, Vec::new());
        // SAFETY: the caller's.
        unsafe { put(graph, handle) }
    })
}

/// # Safety
/// As in CUDA: `executable` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut Handle,
    graph: Handle,
    flags: u64,
) -> CUresult {
    within(|s, _| {
        s.unsafe_call("instantiating a graph")?;
        let Graph { context, work } = s.graphs.get(&graph).ok_or(E::InvalidHandle)?;
        let (context, work) = (*context, work.clone());
        let allocates = work.iter().filter_map(allocated).next().is_some();
        if allocates && s.executables.values().any(|e| e.graph == graph) {
            let why = "a graph that allocates can only be instantiated once at a time";
            return Err(error::refuse(E::NotSupported, why));
        }
        let handle = s.handle();
        let it = Executable {
            context,
            graph,
            flags,
            work,
        };
        s.executables.insert(handle, it);
        // SAFETY: the caller's.
        unsafe { put(executable, handle) }
    })
}

/// Nothing needs to be prepared.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(executable: Handle, stream: Handle) -> CUresult {
    within(|s, _| {
        s.resolve(stream)?;
        let known = s.executables.contains_key(&executable);
        known.then_some(()).ok_or(E::InvalidHandle)
    })
}

/// Does all of a graph's work.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> CUresult {
    within(|s, _| {
        let stream = s.use_stream(stream)?;
        s.launch_graph(executable, stream)
    })
}

/// Destroys a graph.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: Handle) -> CUresult {
    with(|s| {
        s.graphs.remove(&graph).ok_or(E::InvalidHandle)?;
        s.sweep_graph_memory();
        Ok(())
    })
}

/// Destroys an instantiated graph; what it has allocated stays until it is freed.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: Handle) -> CUresult {
    with(|s| {
        s.executables.remove(&executable).ok_or(E::InvalidHandle)?;
        s.sweep_graph_memory();
        Ok(())
    })
}
