//! The other architecture: a check that the agent compiles for it, and a library of it for tests that read one.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command, project,
    tally::Tally,
    tools::{self, CC_AARCH64},
};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Debian's aarch64 glibc, as a package for every machine.
const PACKAGE: &str = "libc6-arm64-cross";

/// Type-checks the agent; skipped where the standard library or the C compiler for it cannot be had.
pub(crate) fn check() -> Result<Tally> {
    if let Err(error) = add_target().and_then(|()| tools::need(&[CC_AARCH64])) {
        println!("SKIP check for {TARGET}: {error:#}");
        return Ok(Tally::SKIPPED);
    }
    let mut cargo = command::cargo();
    cargo.args(["check", "--locked", "--target", TARGET, "--package", "profiler-agent"]);
    command::run(cargo.env("CC_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-gcc"))?;
    Ok(Tally::PASSED)
}

fn add_target() -> Result<()> {
    let sysroot = command::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if PathBuf::from(sysroot.trim()).join("lib/rustlib").join(TARGET).exists() {
        return Ok(());
    }
    ensure!(command::is_installed("rustup"), "no standard library for it, and no rustup to get one");
    command::run(Command::new("rustup").args(["target", "add", TARGET]))
}

/// An aarch64 libc.so.6, unpacked below `target/tools`; nothing is installed.
pub(crate) fn libc() -> Result<PathBuf> {
    let into = project::tools().join("aarch64");
    let library = into.join("usr/aarch64-linux-gnu/lib/libc.so.6");
    if !library.exists() {
        ensure!(
            ["apt-get", "dpkg-deb"].into_iter().all(command::is_installed),
            "apt-get or dpkg-deb is not installed"
        );
        fs::create_dir_all(&into).with_context(|| format!("create {}", into.display()))?;
        let download =
            || command::run(Command::new("apt-get").current_dir(&into).args(["-qq", "download", PACKAGE]));
        // The first try fails on a machine that has not seen its package lists yet.
        if download().is_err() {
            command::run(Command::new("apt-get").args(["-qq", "update"]))?;
            download()?;
        }
        let package = fs::read_dir(&into)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get left no package")?;
        command::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&into))?;
    }
    ensure!(library.exists(), "{PACKAGE} has no {}", library.display());
    Ok(library)
}
