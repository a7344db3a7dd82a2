//! The identity that a linker wrote into an executable.

use std::fmt;

use object::Endianness;
use object::elf;
use object::read::ReadRef;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader as _, SectionHeader as _};

/// Longest id taken, in bytes. GNU ids are 8, 16 or 20 bytes, Go's about 83.
const BUILD_ID_BYTES_MAX: usize = 128;

/// Notes looked at in one segment or section.
const NOTES_MAX: usize = 64;

/// Source: cmd/link/internal/ld/elf.go, `ELF_NOTE_GOBUILDID_TAG`.
const NT_GO_BUILD_ID: u32 = 4;

/// A linker's name for what it wrote; equal in every copy of the file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BuildId {
    /// `NT_GNU_BUILD_ID`: opaque bytes, shown in hexadecimal.
    Gnu(Box<[u8]>),
    /// The Go linker's `action/.../content`, text.
    Go(Box<str>),
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gnu(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::Go(text) => f.write_str(text),
        }
    }
}

/// The build ids of one file; a Go program linked by gcc has both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct BuildIds {
    pub(crate) gnu: Option<BuildId>,
    pub(crate) go: Option<BuildId>,
}

impl BuildIds {
    /// The id to publish: GNU's where there is one, since debug info servers know it.
    pub(crate) fn preferred(&self) -> Option<&BuildId> {
        self.gnu.as_ref().or(self.go.as_ref())
    }

    fn complete(&self) -> bool {
        self.gnu.is_some() && self.go.is_some()
    }

    /// Takes what a run of notes holds; the first id of a kind stays.
    fn take<Elf: FileHeader>(&mut self, endian: Elf::Endian, notes: NoteIterator<'_, Elf>) {
        let mut notes = notes;
        for _ in 0..NOTES_MAX {
            let Ok(Some(note)) = notes.next() else { return };
            match (note.name(), note.n_type(endian)) {
                (b"GNU", elf::NT_GNU_BUILD_ID) => self.gnu = self.gnu.take().or_else(|| gnu(note.desc())),
                (b"Go", NT_GO_BUILD_ID) => self.go = self.go.take().or_else(|| go(note.desc())),
                _ => {}
            }
        }
    }
}

fn gnu(bytes: &[u8]) -> Option<BuildId> {
    let fits = (1..=BUILD_ID_BYTES_MAX).contains(&bytes.len());
    fits.then(|| BuildId::Gnu(bytes.into()))
}

fn go(bytes: &[u8]) -> Option<BuildId> {
    let fits = (1..=BUILD_ID_BYTES_MAX).contains(&bytes.len());
    let text =
        str::from_utf8(bytes).ok().filter(|text| fits && text.bytes().all(|b| b.is_ascii_graphic()))?;
    Some(BuildId::Go(text.into()))
}

/// The build ids of an ELF file: from its PT_NOTE segments, which stripping keeps, then from its note sections.
/// Notes that cannot be read count as absent.
///
/// Source: gABI "Note Section"; `.note.gnu.build-id`, `.note.go.buildid`.
pub(crate) fn build_ids<'data, Elf, R>(
    endian: Endianness,
    data: R,
    segments: &[Elf::ProgramHeader],
    sections: &[Elf::SectionHeader],
) -> BuildIds
where
    Elf: FileHeader<Endian = Endianness>,
    R: ReadRef<'data>,
    Elf: 'data,
{
    let mut ids = BuildIds::default();
    for segment in segments {
        if let Ok(Some(notes)) = segment.notes(endian, data) {
            ids.take(endian, notes);
        }
    }
    for section in sections {
        if ids.complete() {
            break;
        }
        if let Ok(Some(notes)) = section.notes(endian, data) {
            ids.take(endian, notes);
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_shown_as_tools_show_them() {
        assert_eq!(gnu(&[0x0a, 0xff]).unwrap().to_string(), "0aff");
        assert_eq!(go(b"a/b/c").unwrap().to_string(), "a/b/c");
    }

    #[test]
    fn empty_long_and_binary_ids_are_none() {
        assert_eq!(gnu(&[]), None);
        assert_eq!(gnu(&[1; BUILD_ID_BYTES_MAX + 1]), None);
        assert_eq!(go(b"a\0b"), None);
        assert_eq!(go(&[0xff, 0xfe]), None);
    }
}
