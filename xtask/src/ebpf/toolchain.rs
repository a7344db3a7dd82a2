//! The tool chain that the objects are built with: found on the machine, else installed.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::rust_src::RustSrc;
use crate::{command, project};

/// As in `profiler-ebpf/rust-toolchain.toml`; rustup names a nightly by the day after its last commit.
const CHANNEL: &str = "nightly-2026-05-20";
/// The commit that `CHANNEL` was built from, by which a tool chain of another name is recognized.
const RUSTC_COMMIT: &str = "e50aa6fba4e63ab34c72bf9acfd2c307c1155d1a";
/// The last line of bpf-linker that links with rustc's own LLVM; later ones need a system LLVM of the same version.
const LINKER_VERSION: &str = "0.10.3";

/// A complete tool chain.
pub(super) struct Toolchain {
    /// The nightly's folder, with `bin` and `lib` in it.
    pub(super) sysroot: PathBuf,
    /// The bpf-linker program.
    pub(super) linker: PathBuf,
    /// What `core` is built from.
    pub(super) rust_src: RustSrc,
}

impl Toolchain {
    /// Finds or installs the tool chain, with the rust-src whose hash is `rust_src` where one is given.
    pub(super) fn find(rust_src: Option<&str>) -> Result<Self> {
        let (name, sysroot) = nightly()?;
        let rust_src = RustSrc::find(&name, &sysroot, rust_src)?;
        let linker = linker(&sysroot)?;
        Ok(Self { sysroot, linker, rust_src })
    }

    /// The nightly's cargo, which sees nothing of the environment that could change what it builds.
    pub(super) fn cargo(&self) -> Command {
        nightly_cargo(&self.sysroot)
    }
}

/// The tools whose versions are pinned here, as `inputs.sha256` records them.
pub(super) fn pinned() -> [(String, String); 2] {
    [("rustc", format!("{CHANNEL} {RUSTC_COMMIT}")), ("bpf-linker", LINKER_VERSION.to_owned())]
        .map(|(name, value)| (name.to_owned(), value))
}

/// Name and sysroot of the pinned nightly.
fn nightly() -> Result<(String, PathBuf)> {
    if let Some(found) = installed_nightly() {
        return Ok(found);
    }
    ensure!(command::is_installed("rustup"), "rustc {CHANNEL}: rustup is not installed");
    let arguments = ["toolchain", "install", CHANNEL, "--profile", "minimal", "--component", "rust-src"];
    if command::probe(Command::new("rustup").args(arguments)).is_none() {
        bail!("rustc {CHANNEL}: `rustup {}` failed", arguments.join(" "));
    }
    installed_nightly().with_context(|| format!("{CHANNEL} is not built from {RUSTC_COMMIT}"))
}

fn installed_nightly() -> Option<(String, PathBuf)> {
    [CHANNEL, "nightly"].into_iter().find_map(|name| {
        let rustc = |argument: &str| {
            let mut rustup = Command::new("rustup");
            command::probe(rustup.args(["run", name, "rustc", argument]).env("RUSTUP_AUTO_INSTALL", "0"))
        };
        rustc("-vV")?.contains(RUSTC_COMMIT).then_some(())?;
        let sysroot = rustc("--print=sysroot")?;
        Some((name.to_owned(), PathBuf::from(sysroot.trim_end())))
    })
}

/// The pinned nightly's cargo, for what needs a nightly but no more.
pub(crate) fn cargo() -> Result<Command> {
    Ok(nightly_cargo(&nightly()?.1))
}

fn nightly_cargo(sysroot: &Path) -> Command {
    let mut cargo = Command::new(sysroot.join("bin/cargo"));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let builds = text.starts_with("RUST") || text.starts_with("CARGO");
        let fetches =
            ["CARGO_HOME", "CARGO_HTTP", "CARGO_NET", "CARGO_REGISTR", "CARGO_SOURCE", "RUSTUP_HOME"];
        if builds && !fetches.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("RUSTC", sysroot.join("bin/rustc"))
        .env("CARGO_INCREMENTAL", "0")
        // bpf-linker loads rustc's LLVM from here.
        .env("LD_LIBRARY_PATH", sysroot.join("lib"));
    cargo
}

/// bpf-linker in the pinned version: the user's own, ours from before, or built now.
fn linker(sysroot: &Path) -> Result<PathBuf> {
    let ours = project::tools().join("bin/bpf-linker");
    let path = env::var_os("PATH").unwrap_or_default();
    let users = env::split_paths(&path).map(|dir| dir.join("bpf-linker"));
    let is_pinned = |linker: &PathBuf| {
        let version =
            command::probe(Command::new(linker).arg("--version").env("LD_LIBRARY_PATH", sysroot.join("lib")));
        version.is_some_and(|version| version.split_whitespace().nth(1) == Some(LINKER_VERSION))
    };
    if let Some(linker) = users.chain([ours.clone()]).filter(|file| file.is_file()).find(is_pinned) {
        return Ok(linker);
    }
    let mut install = nightly_cargo(sysroot);
    install.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--root"]);
    command::run(install.arg(project::tools())).context("install bpf-linker")?;
    Ok(ours)
}

#[cfg(test)]
mod tests {
    #[test]
    fn channel_is_the_one_that_plain_cargo_would_take() {
        let file = include_str!("../../../profiler-ebpf/rust-toolchain.toml");
        assert!(file.contains(&format!("channel = \"{}\"", super::CHANNEL)), "{file}");
    }
}
