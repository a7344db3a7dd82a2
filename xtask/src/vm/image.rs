//! The root file system of a machine: an archive that the kernel unpacks into memory when it boots.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{command, project};

const DIRECTORY: u32 = 0o04_0000;
const FILE: u32 = 0o10_0000;
const LINK: u32 = 0o12_0000;

/// Files by absolute path; folders come by themselves.
#[derive(Default)]
pub(super) struct Image {
    entries: BTreeMap<PathBuf, Entry>,
}

struct Entry {
    /// Type and permissions, as stat(2) gives them.
    mode: u32,
    /// Of a link where it leads, of a folder nothing.
    content: Vec<u8>,
}

impl Image {
    pub(super) fn bytes(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        self.insert(Path::new(path), Entry { mode: FILE | mode, content });
    }

    pub(super) fn link(&mut self, path: &str, to: &str) {
        self.insert(Path::new(path), Entry { mode: LINK | 0o777, content: to.as_bytes().to_vec() });
    }

    pub(super) fn folder(&mut self, path: &Path) {
        self.insert(path, Entry { mode: DIRECTORY | 0o755, content: Vec::new() });
    }

    /// A file of the host at its own path, and the libraries it is linked with if it is a program.
    pub(super) fn program(&mut self, file: &Path) -> Result<()> {
        self.program_as(file, file)
    }

    /// The same at another path.
    pub(super) fn program_as(&mut self, file: &Path, path: &Path) -> Result<()> {
        if self.entries.contains_key(path) {
            return Ok(());
        }
        let content = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let mode = fs::metadata(file)?.permissions().mode() & 0o777;
        let is_elf = content.starts_with(b"\x7fELF");
        self.insert(path, Entry { mode: FILE | mode, content });
        if is_elf { self.libraries(file) } else { Ok(()) }
    }

    /// A program without its debug information, which the machine would only hold in memory.
    pub(super) fn stripped(&mut self, file: &Path, path: &Path) -> Result<()> {
        let copy = project::target().join("vm/stripped");
        command::run(Command::new("strip").arg("-o").arg(&copy).arg(file))?;
        self.program_as(&copy, path)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.entries.keys().map(PathBuf::as_path)
    }

    fn libraries(&mut self, file: &Path) -> Result<()> {
        // It fails for a static program, which needs none.
        let libraries = command::probe(Command::new("ldd").arg(file)).unwrap_or_default();
        parse_ldd(&libraries).try_for_each(|library| self.program(library))
    }

    fn insert(&mut self, path: &Path, entry: Entry) {
        for folder in path.ancestors().skip(1).filter(|folder| folder.parent().is_some()) {
            let entry = Entry { mode: DIRECTORY | 0o755, content: Vec::new() };
            self.entries.entry(folder.to_owned()).or_insert(entry);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// The archive.
    ///
    /// Source: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources.
    pub(super) fn cpio(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for (inode, (path, Entry { mode, content })) in self.entries.iter().enumerate() {
            let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
            write_entry(&mut archive, inode + 1, *mode, &name, content);
        }
        write_entry(&mut archive, 0, 0, "TRAILER!!!", &[]);
        archive
    }
}

/// Writes a header in its 13 numbers of 8 digits, the name, and the content, both padded to 4 bytes.
fn write_entry(archive: &mut Vec<u8>, inode: usize, mode: u32, name: &str, content: &[u8]) {
    let [user, group, links, modified, device, check] = [0, 0, 1, 0, 0, 0];
    let (bytes, name_bytes) = (content.len(), name.len() + 1);
    archive.extend_from_slice(b"070701");
    for number in [inode, mode as usize, user, group, links, modified, bytes] {
        archive.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    for number in [device, device, device, device, name_bytes, check] {
        archive.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Files that `ldd` names: `libc.so.6 => /lib/libc.so.6 (0x7f..)` and `/lib64/ld-linux-x86-64.so.2 (0x7f..)`.
fn parse_ldd(output: &str) -> impl Iterator<Item = &Path> {
    output.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_are_padded_to_4_bytes() {
        let mut image = Image::default();
        image.bytes("/bin/sub/odd", 0o755, b"12345".to_vec());
        image.link("/bin/link", "sub/odd");
        let text = String::from_utf8(image.cpio()).expect("nothing in it is binary");
        assert_eq!(text.len() % 4, 0);
        let names: Vec<&str> =
            text.split("070701").filter_map(|entry| entry.get(104..)?.split('\0').next()).collect();
        assert_eq!(names, ["bin", "bin/link", "bin/sub", "bin/sub/odd", "TRAILER!!!"]);
        let odd = text.split("070701").nth(4).expect("five entries");
        assert_eq!(&odd[..16], "00000004000081ed", "number and mode");
        assert_eq!(&odd[48..56], "00000005", "size");
        // Header and name are 122 bytes, the content is 5.
        assert!(odd.ends_with("bin/sub/odd\0\0\x0012345\0\0\0"), "{odd:?}");
    }

    #[test]
    fn libraries_are_found_with_and_without_an_arrow() {
        let output = "\tlinux-vdso.so.1 (0x00007f50)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f50)\n\t/lib64/ld.so (0x7f50)\n";
        assert!(parse_ldd(output).eq(["/lib/libc.so.6", "/lib64/ld.so"].map(Path::new)));
        assert_eq!(parse_ldd("\tnot a dynamic executable\n").count(), 0);
    }
}
