//! The data directory at the start: made, locked, freed of what a crash left.

use std::{
    collections::HashSet,
    fs::{self, File, Permissions, TryLockError},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    layout::{FileKind, Hour, Layout, TABLES, Table, file_kind, hours},
    part::{Part, PartError, remove_files},
};
use crate::{
    metrics::Metrics,
    private::{self, DIRECTORY_MODE},
    wal::WalError,
};

/// Why a store did not open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{path} is in use by another backend")]
    Locked { path: PathBuf },
    #[error(
        "{path} belongs to user {owner}, who could read the store: give a directory inside it, or another one"
    )]
    Foreign { path: PathBuf, owner: u32 },
    #[error(
        "{path} is open to others (mode {mode:04o}) and holds other files: give a directory inside it, or chmod 0700 it"
    )]
    Shared { path: PathBuf, mode: u32 },
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("write-ahead log")]
    Wal(#[from] WalError),
    #[error("parts")]
    Part(#[from] PartError),
}

/// Lists the parts, after removing what unfinished writes and compactions left behind.
pub(super) fn open_parts(layout: &Layout, metrics: &Metrics) -> Result<Vec<Arc<Part>>, OpenError> {
    let mut parts = Vec::new();
    for (hour, directory) in hours(layout, Table::Profiles).map_err(io_failure("list", layout.data_dir()))? {
        for name in part_names(&directory)? {
            match Part::open(layout, hour, name) {
                Ok(part) => parts.push(part),
                Err(error) => {
                    // Left in place: a newer version may read it.
                    metrics.parts_unreadable.add(1);
                    tracing::error!("a part was left out: {}", crate::describe(&error));
                }
            }
        }
    }
    let replaced: HashSet<(Hour, String)> =
        parts.iter().flat_map(|part| part.replaces.iter().map(|name| (part.hour, name.clone()))).collect();
    parts.retain(|part| !replaced.contains(&(part.hour, part.name.clone())));
    for (hour, name) in &replaced {
        remove_files(layout, *hour, name);
    }
    remove_orphans(layout)?;
    Ok(parts.into_iter().map(Arc::new).collect())
}

fn part_names(directory: &Path) -> Result<Vec<String>, OpenError> {
    let mut names = Vec::new();
    for entry in directory.read_dir().map_err(io_failure("list", directory))? {
        let name = entry.map_err(io_failure("list", directory))?.file_name();
        if let Some(FileKind::Part(part)) = name.to_str().map(file_kind) {
            names.push(part);
        }
    }
    Ok(names)
}

/// Deletes temporary files, and files of parts that have none in `profiles`.
fn remove_orphans(layout: &Layout) -> Result<(), OpenError> {
    for table in TABLES {
        for (hour, directory) in hours(layout, table).map_err(io_failure("list", layout.data_dir()))? {
            for entry in directory.read_dir().map_err(io_failure("list", &directory))? {
                let entry = entry.map_err(io_failure("list", &directory))?;
                let orphan = match entry.file_name().to_str().map(file_kind) {
                    Some(FileKind::Temporary) => true,
                    Some(FileKind::Part(name)) => !layout.file(Table::Profiles, hour, &name).exists(),
                    Some(FileKind::Foreign) | None => false,
                };
                if orphan {
                    fs::remove_file(entry.path()).map_err(io_failure("remove", &entry.path()))?;
                }
            }
        }
    }
    Ok(())
}

/// Makes the data directory one that only its owner, which is us, can look into.
///
/// An existing one is closed to others when it is empty or a store's already; what holds other files stays as it is, or
/// `--data-dir /tmp` would take it from everybody.
pub(super) fn create_data_dir(layout: &Layout) -> Result<(), OpenError> {
    let path = layout.data_dir();
    private::directory_builder().recursive(true).create(path).map_err(io_failure("create", path))?;
    let metadata = fs::metadata(path).map_err(io_failure("look at", path))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(OpenError::Foreign { path: path.to_owned(), owner: metadata.uid() });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let is_empty = path.read_dir().map_err(io_failure("list", path))?.next().is_none();
    if !is_empty && !layout.lock().exists() {
        return Err(OpenError::Shared { path: path.to_owned(), mode });
    }
    let permissions = Permissions::from_mode(DIRECTORY_MODE);
    fs::set_permissions(path, permissions).map_err(io_failure("close to others", path))
}

pub(super) fn lock(path: &Path) -> Result<File, OpenError> {
    let file = private::file_options().create(true).truncate(false).open(path);
    let file = file.map_err(io_failure("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io_failure("lock", path)(source)),
    }
}

fn io_failure(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { operation, path, source }
}
