//! Where things are in this checkout, and the walk over a folder that every comparison of files uses.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The checkout's top folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the checkout's top folder")
}

/// What xtask makes and may lose: tools, BPF builds, test programs, archives.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Tools that xtask installs for itself, each in the version it pins.
pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// Every regular file under `dir`, sorted by path, as paths below `dir`.
pub(crate) fn files_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let dir = dir.join(&relative);
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            let path = relative.join(entry.file_name());
            match entry.file_type()? {
                kind if kind.is_dir() => pending.push(path),
                kind if kind.is_file() => files.push(path),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}
