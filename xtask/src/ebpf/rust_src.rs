//! The sources of `core`, which is built anew for BPF: found or fetched, and told apart by their contents.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{command, debian::Suite, project, sha256};

/// Names an archive with a `library` folder, for a machine that can get rust-src from nowhere else.
const ARCHIVE_VARIABLE: &str = "PROFILER_RUST_SRC";

/// Below `library`: all that a build of `core` reads.
const CORE_SOURCES: [&str; 4] =
    ["core/src", "compiler-builtins", "portable-simd/crates/core_simd/src", "stdarch/crates/core_arch/src"];

/// The suite of Debian that has a rust-src as new as the pinned nightly.
const DEBIAN_SUITE: &str = "sid";

/// A `library` folder of Rust's sources.
pub(super) struct RustSrc {
    pub(super) library: PathBuf,
    /// Hash over the names and contents of what a build of `core` reads.
    pub(super) hash: String,
}

impl RustSrc {
    /// The first one that is to be had, and whose hash is `wanted` where one is.
    ///
    /// A rust-src of another release builds the same programs, but not the same bytes.
    pub(super) fn find(toolchain: &str, sysroot: &Path, wanted: Option<&str>) -> Result<Self> {
        let own = sysroot.join("lib/rustlib/src/rust/library");
        let ways: [(&str, &dyn Fn() -> Result<PathBuf>); 5] = [
            ("the tool chain's own", &|| Ok(own.clone())),
            ("fetched before", &|| Ok(kept())),
            (ARCHIVE_VARIABLE, &from_archive),
            ("rustup", &|| from_rustup(toolchain).map(|()| own.clone())),
            ("Debian", &|| fetch(from_debian)),
        ];
        let mut refused = Vec::new();
        for (name, way) in ways {
            match way().and_then(|library| Self::open(library, wanted)) {
                Ok(found) => return Ok(found),
                Err(error) => refused.push(format!("{name}: {error:#}")),
            }
        }
        bail!("rust-src: {}", refused.join("; "))
    }

    fn open(library: PathBuf, wanted: Option<&str>) -> Result<Self> {
        ensure!(library.is_dir(), "there is none");
        let mut files = vec![PathBuf::from("Cargo.lock")];
        for dir in CORE_SOURCES.map(Path::new) {
            files.extend(project::files_under(&library.join(dir))?.into_iter().map(|file| dir.join(file)));
        }
        let hash = sha256::of_tree(&library, &files)?;
        ensure!(wanted.is_none_or(|wanted| wanted == hash), "it is another release's");
        Ok(Self { library, hash })
    }
}

/// Where a fetched one stays, so that the user's tool chain is left as it is.
fn kept() -> PathBuf {
    project::tools().join("rust-src/library")
}

fn from_archive() -> Result<PathBuf> {
    let archive = env::var_os(ARCHIVE_VARIABLE).context("it is not set")?;
    fetch(|into| command::run(Command::new("tar").arg("-C").arg(into).arg("-xf").arg(&archive)))
}

fn from_rustup(toolchain: &str) -> Result<()> {
    let arguments = ["component", "add", "rust-src", "--toolchain", toolchain];
    let added = command::probe(Command::new("rustup").args(arguments));
    added.map(drop).with_context(|| format!("`rustup {}` failed", arguments.join(" ")))
}

fn from_debian(into: &Path) -> Result<()> {
    Suite::fetch(DEBIAN_SUITE, into)?.unpack("rust-src", into)
}

/// Lets `source` fill an empty folder, and keeps the `library` folder that is somewhere in it then.
fn fetch(source: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let staging = project::tools().join("rust-src.incomplete");
    remove(&staging)?;
    fs::create_dir_all(&staging).with_context(|| format!("create {}", staging.display()))?;
    source(&staging)?;
    let library = find_library(&staging)?;
    let kept = kept();
    let parent = kept.parent().expect("library lies in a folder");
    remove(parent)?;
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    fs::rename(&library, &kept).with_context(|| format!("move {}", library.display()))?;
    remove(&staging)?;
    Ok(kept)
}

/// The folder that `core/src/lib.rs` is in, by whatever path the archive has it.
fn find_library(dir: &Path) -> Result<PathBuf> {
    let files = project::files_under(dir)?;
    let is_core = |file: &&PathBuf| file.ends_with("library/core/src/lib.rs");
    let core = files.iter().find(is_core).context("there is no library/core/src/lib.rs in it")?;
    Ok(dir.join(core.ancestors().nth(3).expect("three names follow the folder")))
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    Ok(())
}
