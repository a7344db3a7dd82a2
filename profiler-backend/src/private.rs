//! Files and directories that only their owner can look into: stacks and labels tell what runs here.

use std::{
    fs::{DirBuilder, OpenOptions},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};

/// Mode of every directory of the store.
pub(crate) const DIRECTORY_MODE: u32 = 0o700;
/// Mode of every file of the store.
const FILE_MODE: u32 = 0o600;

/// Opens for writing; what it creates, it creates for the owner.
pub(crate) fn file_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(FILE_MODE);
    options
}

/// Creates directories for the owner.
pub(crate) fn directory_builder() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(DIRECTORY_MODE);
    builder
}
