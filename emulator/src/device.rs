//! A device for Rust programs: memory, modules, launches.

use crate::config::Config;
use crate::machine::code::Kernel;
use crate::machine::decode;
use crate::machine::launch::Launch;
use crate::machine::memory::{AccessError, Memory};
use crate::ptx::ast::{Init, Space};
use crate::ptx::{self, PtxError};
use crate::report::LaunchReport;
use std::collections::HashMap;
use std::sync::Arc;

/// Why a device refused something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The module is not PTX text that can be run.
    #[error(transparent)]
    Ptx(#[from] PtxError),
    /// No memory of that size is left.
    #[error("{0} bytes of device memory are not available: free some, or raise Config::memory")]
    OutOfMemory(u64),
    /// The host touched device memory where there is none.
    #[error("device address {address:#x} with {len} bytes: {why:?}")]
    Address {
        /// The address.
        address: u64,
        /// Bytes wanted there.
        len: usize,
        /// What is wrong.
        why: AccessError,
    },
    /// The module has no such kernel.
    #[error("kernel {0} is not in the module: use one of its .entry names")]
    NoKernel(String),
    /// The launch is not possible.
    #[error("{0}")]
    Launch(String),
}

/// A kernel argument.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Arg<'a> {
    I32(i32),
    U32(u32),
    I64(i64),
    /// Also device addresses.
    U64(u64),
    F32(f32),
    F64(f64),
    /// A structure passed by value.
    Bytes(&'a [u8]),
}

impl Arg<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Arg::I32(v) => v.to_le_bytes().to_vec(),
            Arg::U32(v) => v.to_le_bytes().to_vec(),
            Arg::I64(v) => v.to_le_bytes().to_vec(),
            Arg::U64(v) => v.to_le_bytes().to_vec(),
            Arg::F32(v) => v.to_le_bytes().to_vec(),
            Arg::F64(v) => v.to_le_bytes().to_vec(),
            Arg::Bytes(v) => v.to_vec(),
        }
    }
}

/// A loaded module.
#[derive(Clone, Debug, Default)]
pub struct Module {
    kernels: HashMap<String, Arc<Kernel>>,
    /// Variables: address and size.
    globals: HashMap<String, (u64, u64)>,
}

impl Module {
    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Option<&Arc<Kernel>> {
        self.kernels.get(name)
    }

    /// Names of all kernels, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.kernels.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Address and size of a variable.
    pub fn global(&self, name: &str) -> Option<(u64, u64)> {
        self.globals.get(name).copied()
    }

    /// Addresses of all variables.
    pub fn globals(&self) -> impl Iterator<Item = u64> + '_ {
        self.globals.values().map(|(address, _)| *address)
    }
}

/// An emulated GPU.
pub struct Device {
    /// Checks, schedule and so on; may be changed between launches.
    pub config: Config,
    memory: Memory,
    launches: u64,
}

impl Device {
    /// A device without any allocation.
    pub fn new(config: Config) -> Device {
        Device {
            config,
            memory: Memory::default(),
            launches: 0,
        }
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its memory, to change what is registered.
    pub fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// Allocates bytes that count as uninitialised.
    pub fn alloc(&mut self, len: u64) -> Result<u64, Error> {
        let tracked = self.config.checks.uninitialised;
        self.memory
            .allocate(len, self.config.memory, tracked)
            .ok_or(Error::OutOfMemory(len))
    }

    /// Allocates and fills.
    pub fn alloc_with(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let address = self.alloc(bytes.len() as u64)?;
        self.write(address, bytes)?;
        Ok(address)
    }

    /// Frees an allocation; false if the address is not the start of one.
    pub fn free(&mut self, address: u64) -> bool {
        self.memory.free(address)
    }

    /// Copies to the device.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        let error = |why| Error::Address {
            address,
            len: bytes.len(),
            why,
        };
        self.memory.write(address, bytes).map_err(error)
    }

    /// Copies from the device.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let len = bytes.len();
        self.memory
            .read(address, bytes)
            .map_err(|why| Error::Address { address, len, why })
    }

    /// Parses and decodes PTX text and allocates its variables.
    pub fn load(&mut self, text: &str) -> Result<Module, Error> {
        let ast = ptx::parse(text)?;
        let mut module = Module::default();
        let loaded = self.load_into(&ast, &mut module);
        if loaded.is_err() {
            self.unload(&module);
        }
        loaded.map(|()| module)
    }

    fn load_into(&mut self, ast: &ptx::Module, module: &mut Module) -> Result<(), Error> {
        let mut addresses: HashMap<String, u64> = HashMap::new();
        let variables = || ast.variables.iter().filter(|v| v.space != Space::Shared);
        for v in variables() {
            if v.external {
                let message = format!(
                    "extern variable {} needs a linker, which is not implemented",
                    v.name
                );
                return Err(PtxError::new(v.line, message).into());
            }
            let address = self
                .memory
                .allocate(v.size, self.config.memory, false)
                .ok_or(Error::OutOfMemory(v.size))?;
            addresses.insert(v.name.to_string(), address);
            module.globals.insert(v.name.to_string(), (address, v.size));
        }
        let mut functions = HashMap::new();
        for v in variables() {
            let size = v.ty.size() as usize;
            for (i, init) in v.init.iter().enumerate() {
                let bits = match init {
                    Init::Bits(bits) => *bits,
                    Init::Symbol(name, offset) => match addresses.get(*name) {
                        Some(address) => address.wrapping_add(*offset as u64),
                        None => {
                            functions.insert(*name, v.line);
                            continue;
                        }
                    },
                };
                let at = addresses[v.name] + (i * size) as u64;
                self.write(at, &bits.to_le_bytes()[..size.min(8)])?;
            }
        }
        if let Some((name, line)) = functions.into_iter().next() {
            let message =
                format!("{name} is not a variable; tables of functions are not implemented");
            return Err(PtxError::new(line, message).into());
        }
        for f in ast.functions.iter().filter(|f| f.entry) {
            let kernel = decode::kernel(ast, f, &addresses)?;
            module.kernels.insert(f.name.to_string(), Arc::new(kernel));
        }
        Ok(())
    }

    /// Frees a module's variables.
    pub fn unload(&mut self, module: &Module) {
        for address in module.globals() {
            self.memory.free(address);
        }
    }

    /// Runs a kernel to its end. Errors that the checks find are in the report.
    pub fn launch(
        &mut self,
        module: &Module,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        args: &[Arg<'_>],
    ) -> Result<LaunchReport, Error> {
        let kernel = module
            .kernel(name)
            .ok_or_else(|| Error::NoKernel(name.to_string()))?;
        if args.len() != kernel.params.len() {
            let (n, m) = (args.len(), kernel.params.len());
            return Err(Error::Launch(format!(
                "{name}: {n} arguments, expected {m}"
            )));
        }
        let mut params = vec![0; kernel.param_size as usize];
        for (i, (arg, param)) in args.iter().zip(&kernel.params).enumerate() {
            let bytes = arg.bytes();
            if bytes.len() != param.size as usize {
                let (n, m) = (bytes.len(), param.size);
                return Err(Error::Launch(format!(
                    "{name}: argument {i} has {n} bytes, expected {m}"
                )));
            }
            params[param.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let kernel = kernel.clone();
        self.launch_raw(&kernel, grid, block, dynamic_shared, &params)
    }

    /// As [`Device::launch`], with the parameter buffer made by the caller.
    pub fn launch_raw(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[u8],
    ) -> Result<LaunchReport, Error> {
        self.launches += 1;
        let (memory, config, id) = (&self.memory, &self.config, self.launches);
        Launch::new(
            kernel,
            grid,
            block,
            dynamic_shared,
            params,
            memory,
            config,
            id,
        )
        .map(|launch| launch.run())
        .map_err(Error::Launch)
    }
}
