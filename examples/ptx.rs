//! Writes the kernels' PTX to a folder, one file an operation and target: `ptx FOLDER`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("ptx: name the folder to write to");
        return ExitCode::FAILURE;
    };
    match write(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", Path::new(&folder).display());
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for module in dust_kernels::cuda::MODULES {
        let path = folder.join(format!("{}.{}.ptx", module.op, module.arch));
        std::fs::write(&path, module.ptx())?;
        println!("{}", path.display());
    }
    Ok(())
}
