//! From an executable to its unwind table.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};

use profiler_unwind::{UnwindError, UnwindTable};

use super::ARCHITECTURE;
use crate::{
    executable::Executable,
    sys::{file_map::FileMap, sigbus::FileShrank},
    vdso,
};

/// Files larger than this have no table. Only the pages with unwind information are read: 5 MB of a file of 200.
const FILE_BYTES_MAX: u64 = 2 << 30;

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    #[error("map or read the file")]
    Io(#[from] io::Error),
    #[error("{bytes} bytes, more than {FILE_BYTES_MAX}")]
    TooLarge { bytes: u64 },
    #[error("the file was made shorter while it was read")]
    Shrank,
    #[error("the reader of unwind information panicked")]
    Panicked,
    #[error("made for another machine")]
    Machine,
    #[error("read unwind information")]
    Unwind(#[from] UnwindError),
}

impl MakeError {
    /// The name used in metrics.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Io(_) | Self::Shrank => Reason::File,
            Self::TooLarge { .. } => Reason::TooLarge,
            Self::Panicked => Reason::Panic,
            Self::Machine => Reason::Machine,
            Self::Unwind(error) => match error {
                UnwindError::NoUnwindInformation | UnwindError::NoCode => Reason::NoUnwindInformation,
                UnwindError::Machine { .. } => Reason::Machine,
                UnwindError::Headers(_) | UnwindError::Malformed { .. } => Reason::Malformed,
                UnwindError::CodeTooLarge { .. }
                | UnwindError::TooManyFdes { .. }
                | UnwindError::TooManyRows { .. }
                | UnwindError::TooMuchWork { .. }
                | UnwindError::VdsoTooLarge { .. } => Reason::TooLarge,
            },
        }
    }
}

/// Why a table could not be had, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The file could not be read.
    File,
    /// The file is larger, or its unwind information more, than is ever taken.
    TooLarge,
    /// The reader of unwind information failed.
    Panic,
    /// Code of another machine.
    Machine,
    /// The file has none.
    NoUnwindInformation,
    /// The unwind information breaks off, or the file is no ELF file.
    Malformed,
    /// The kernel's maps are full of tables in use.
    NoRoom,
    /// More processes than the kernel's map holds.
    TooManyProcesses,
    /// More executable ranges in one process than its record holds.
    TooManyMappings,
    /// A map could not be written.
    Map,
}

impl Reason {
    /// Every reason, in order.
    pub(crate) const ALL: [Self; 10] = [
        Self::File,
        Self::TooLarge,
        Self::Panic,
        Self::Machine,
        Self::NoUnwindInformation,
        Self::Malformed,
        Self::NoRoom,
        Self::TooManyProcesses,
        Self::TooManyMappings,
        Self::Map,
    ];

    /// The name used in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::TooLarge => "too_large",
            Self::Panic => "panic",
            Self::Machine => "machine",
            Self::NoUnwindInformation => "no_unwind_information",
            Self::Malformed => "malformed",
            Self::NoRoom => "no_room",
            Self::TooManyProcesses => "too_many_processes",
            Self::TooManyMappings => "too_many_mappings",
            Self::Map => "map",
        }
    }
}

/// Reads the table of a file.
pub(super) fn of_executable(executable: &Executable) -> Result<UnwindTable, MakeError> {
    let file = executable.file();
    let bytes = file.metadata()?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(MakeError::TooLarge { bytes });
    }
    let map = FileMap::new(file, usize::try_from(bytes).map_err(|_| MakeError::TooLarge { bytes })?)?;
    let in_steps = |bytes: &[u8]| profiler_unwind::from_elf_in_steps(bytes, &mut || map.release());
    map.read(|bytes| parse(bytes, in_steps)).map_err(|FileShrank| MakeError::Shrank)?
}

/// Reads the table of this process's vDSO, which is the one of all.
pub(super) fn of_vdso() -> Result<UnwindTable, MakeError> {
    parse(&vdso::image()?, profiler_unwind::vdso::from_image)
}

/// The bytes are not trusted. A parser that panics is counted, and the process has no table.
fn parse(
    bytes: &[u8],
    parser: impl FnOnce(&[u8]) -> Result<UnwindTable, UnwindError>,
) -> Result<UnwindTable, MakeError> {
    let table = catch_unwind(AssertUnwindSafe(|| parser(bytes))).map_err(|_| MakeError::Panicked)??;
    if table.architecture() == ARCHITECTURE { Ok(table) } else { Err(MakeError::Machine) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executable::testing::read;

    #[test]
    fn this_program_and_the_vdso_have_tables() {
        let executable = read("/proc/self/exe".as_ref()).expect("a test has a file");
        assert!(of_executable(&executable).expect("a table").counts().rows > 1000);
        assert!(of_vdso().expect("a table").counts().rows > 0);
    }

    #[test]
    fn a_file_whose_unwind_information_is_random_gives_a_table_or_an_error() {
        let mut bytes = std::fs::read("/proc/self/exe").expect("a test has a file");
        let half = bytes.len() / 2;
        bytes.iter_mut().skip(4096).step_by(7).for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(7));
        for end in [0, 3, 64, 4096, half] {
            let _ = parse(&bytes[..end], profiler_unwind::from_elf).map_err(|error| {
                assert_ne!(error.reason(), Reason::Panic, "{end} bytes");
            });
        }
    }

    #[test]
    fn every_reason_has_a_name_of_its_own() {
        let names: std::collections::HashSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
