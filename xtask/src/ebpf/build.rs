//! One build of the BPF programs: the same bytes wherever the checkout, the cargo home and the tool chain lie.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{rustc::WRAPPER_VARIABLE, toolchain::Toolchain};
use crate::{command, project};

/// rustc's name of little-endian BPF; every machine we run on is little-endian.
pub(super) const TARGET: &str = "bpfel-unknown-none";

/// Compiler flags, but for those that hold a path. `--btf` writes the map types that the loader reads.
pub(super) const FLAGS: [&str; 2] = ["-Cdebuginfo=2", "-Clink-arg=--btf"];

/// Builds the programs of the checkout `root` for kernels of `arch`, and returns the object.
///
/// `arch` decides the layout of the sampled task's registers; the instructions are BPF's.
pub(super) fn object(root: &Path, toolchain: &Toolchain, arch: &str) -> Result<Vec<u8>> {
    let crate_dir = root.join("profiler-ebpf");
    let target_dir = project::target().join("ebpf").join(arch);
    // The folder of the registry's sources, which is in the flags, is there only after a download.
    command::run(toolchain.cargo().current_dir(&crate_dir).args(["fetch", "--locked", "--quiet"]))?;
    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(&crate_dir)
        .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root, toolchain, arch)?)
        // For cargo's own tests, but the only way to a rust-src that is not in the tool chain's folder; the pin of the
        // nightly pins it too.
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &toolchain.rust_src.library)
        .env("RUSTC_WRAPPER", env::current_exe().context("find xtask's own program")?)
        .env(WRAPPER_VARIABLE, "1");
    command::run(&mut cargo)?;
    let object = target_dir.join(TARGET).join("release/profiler");
    fs::read(&object).with_context(|| format!("read {}", object.display()))
}

/// Flags as cargo's `CARGO_ENCODED_RUSTFLAGS` takes them, separated by 0x1f.
fn rustflags(root: &Path, toolchain: &Toolchain, arch: &str) -> Result<OsString> {
    let mut flags: Vec<OsString> = FLAGS.map(OsString::from).into();
    // aya-ebpf's choice of bindings, which its build script leaves alone when it is given here.
    flags.push(format!("--cfg=bpf_target_arch=\"{arch}\"").into());
    flags.push(concat("-Clinker=", &toolchain.linker, ""));
    // rustc takes the last prefix that matches.
    flags.push(concat("--remap-path-prefix=", root, "=/profiler"));
    flags.push(concat("--remap-path-prefix=", &toolchain.sysroot, "=/rust"));
    flags.push(concat("--remap-path-prefix=", &toolchain.rust_src.library, "=/rust/library"));
    for sources in registry_sources()? {
        flags.push(concat("--remap-path-prefix=", &sources, "=/crates"));
    }
    Ok(flags.join("\u{1f}".as_ref()))
}

fn concat(before: &str, path: &Path, after: &str) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text.push(after);
    text
}

/// Where cargo unpacks crates, one folder a registry, whose name depends on the registry's address.
fn registry_sources() -> Result<Vec<PathBuf>> {
    let cargo_home = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => env::home_dir().context("no CARGO_HOME and no home folder")?.join(".cargo"),
    };
    let dir = cargo_home.join("registry/src");
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}
