//! xtask as cargo's `RUSTC_WRAPPER`: the compiler call with everything that tells one checkout from another taken out.
//!
//! cargo gives each crate a `-C metadata` hash that covers the absolute paths of the standard library and of path
//! dependencies outside the workspace. It ends up in symbol names, and so in debug information and in the order of
//! functions. A name and a version identify our few crates as well; `--remap-path-prefix` cannot do this.

use std::{
    env,
    ffi::{OsStr, OsString},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use super::build::TARGET;

/// Set for cargo's compiler calls only: xtask is the wrapper when it is there.
pub(super) const WRAPPER_VARIABLE: &str = "PROFILER_XTASK_RUSTC_WRAPPER";

/// Does the compiler's work when cargo called us in its place; `None` when a user called us.
pub(crate) fn wrapper() -> Option<Result<ExitCode>> {
    env::var_os(WRAPPER_VARIABLE).map(|_| compile())
}

fn compile() -> Result<ExitCode> {
    let mut args = env::args_os().skip(1);
    let rustc = args.next().context("cargo names the compiler first")?;
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let status = Command::new(&rustc)
        .args(stable(args.collect(), &version))
        .status()
        .with_context(|| format!("start {}", rustc.display()))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// `args` with the crate's metadata replaced by its name and version, when they compile for BPF.
fn stable(mut args: Vec<OsString>, version: &str) -> Vec<OsString> {
    let name = match value_after(&args, "--crate-name") {
        Some(name) if value_after(&args, "--target") == Some(OsStr::new(TARGET)) => name.to_owned(),
        _ => return args,
    };
    for arg in &mut args {
        if arg.as_encoded_bytes().starts_with(b"metadata=") {
            *arg = OsString::from("metadata=");
            arg.push(&name);
            arg.push("-");
            arg.push(version);
        }
    }
    args
}

fn value_after<'a>(args: &'a [OsString], option: &str) -> Option<&'a OsStr> {
    let at = args.iter().position(|arg| arg == option)?;
    args.get(at + 1).map(OsString::as_os_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(args: &str, expect: &str) {
        let args = stable(args.split(' ').map(OsString::from).collect(), "1.2.3");
        let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        assert_eq!(args.join(" "), expect);
    }

    #[test]
    fn metadata_of_a_bpf_crate_is_its_name_and_version() {
        check(
            "--crate-name core a.rs -C metadata=2b17df2b -C extra-filename=-9f41 --target bpfel-unknown-none",
            "--crate-name core a.rs -C metadata=core-1.2.3 -C extra-filename=-9f41 --target bpfel-unknown-none",
        );
    }

    #[test]
    fn crates_for_the_host_and_questions_pass_unchanged() {
        for args in ["--crate-name syn a.rs -C metadata=2b17", "-vV", "--crate-name ___ --print=cfg"] {
            check(args, args);
        }
    }
}
