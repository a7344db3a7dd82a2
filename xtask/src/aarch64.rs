//! A library of the other architecture, for tests that read it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{command, project};

/// Debian's aarch64 glibc, as a package for every machine.
const PACKAGE: &str = "libc6-arm64-cross";

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
