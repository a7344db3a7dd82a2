//! The objects of a process in the order in which its dynamic linker looks symbols up.
//!
//! ```text
//! auxv: AT_PHDR ─▶ program headers: PT_DYNAMIC ─▶ DT_DEBUG ─▶ r_debug: r_map ─▶ link_map: l_addr, l_next ─▶ ..
//! ```
//! Source: elf(5); `struct r_debug` and `struct link_map` of link.h, which glibc and musl share.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
};

use object::elf::{DT_DEBUG, DT_NULL, PT_DYNAMIC, PT_INTERP, PT_PHDR};

/// Objects followed: a list that others write has no end to rely on.
const OBJECTS_MAX: usize = 4096;
/// Program headers and dynamic entries read.
const ENTRIES_MAX: u64 = 1024;

/// Source: include/uapi/linux/auxvec.h.
const AT_PHDR: u64 = 3;
const AT_PHNUM: u64 = 5;

/// What a process has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Objects {
    /// Its executable alone.
    Static,
    /// By load address, less what each file states, in the order of symbol look-up.
    Dynamic(Vec<u64>),
    /// Its dynamic linker is at work, or has not begun.
    NotReady,
}

/// Looks into a process below its directory in `/proc`; `None` where that is not allowed or it is gone.
pub(super) fn objects(directory: &Path) -> Option<Objects> {
    let auxv = fs::read(directory.join("auxv")).ok()?;
    let memory = File::open(directory.join("mem")).ok()?;
    read_objects(&auxv, |addr| {
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, addr).ok()?;
        Some(u64::from_ne_bytes(word))
    })
}

/// `read` gives the word at an address of the process.
fn read_objects(auxv: &[u8], read: impl Fn(u64) -> Option<u64>) -> Option<Objects> {
    let headers = ProgramHeaders::read(auxv, &read)?;
    if !headers.has_interpreter {
        return Some(Objects::Static);
    }
    let debug = headers.dynamic.and_then(|dynamic| dynamic_entry(dynamic, DT_DEBUG.into(), &read));
    let Some(debug) = debug.filter(|&debug| debug != 0) else { return Some(Objects::NotReady) };
    let (map, state) = (read(debug + 8)?, read(debug + 24)? as u32);
    if map == 0 || state != 0 {
        return Some(Objects::NotReady);
    }
    let next = |&object: &u64| read(object.wrapping_add(24)).filter(|&next| next != 0);
    let chain = std::iter::successors(Some(map), next).take(OBJECTS_MAX);
    Some(Objects::Dynamic(chain.map_while(&read).collect()))
}

/// What the program headers of the executable tell.
struct ProgramHeaders {
    has_interpreter: bool,
    /// Address of the dynamic entries.
    dynamic: Option<u64>,
}

impl ProgramHeaders {
    fn read(auxv: &[u8], read: &impl Fn(u64) -> Option<u64>) -> Option<Self> {
        const HEADER_BYTES: u64 = 56;
        let (table, count) = (auxiliary(auxv, AT_PHDR)?, auxiliary(auxv, AT_PHNUM)?);
        let mut headers = Self { has_interpreter: false, dynamic: None };
        // A file without PT_PHDR lies where it says.
        let mut bias = 0;
        let mut dynamic = None;
        for index in 0..count.min(ENTRIES_MAX) {
            let header = table.wrapping_add(index * HEADER_BYTES);
            let (kind, vaddr) = (read(header)? as u32, read(header.wrapping_add(16))?);
            match kind {
                PT_PHDR => bias = table.wrapping_sub(vaddr),
                PT_INTERP => headers.has_interpreter = true,
                PT_DYNAMIC => dynamic = Some(vaddr),
                _ => {}
            }
        }
        headers.dynamic = dynamic.map(|dynamic: u64| dynamic.wrapping_add(bias));
        Some(headers)
    }
}

/// The value behind a tag of the auxiliary vector.
fn auxiliary(auxv: &[u8], wanted: u64) -> Option<u64> {
    let words: Vec<u64> = auxv.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    words.as_chunks::<2>().0.iter().find(|[tag, _]| *tag == wanted).map(|[_, value]| *value)
}

/// The value behind a tag of the dynamic section.
fn dynamic_entry(dynamic: u64, wanted: u64, read: &impl Fn(u64) -> Option<u64>) -> Option<u64> {
    for index in 0..ENTRIES_MAX {
        let entry = dynamic.wrapping_add(index * 16);
        let tag = read(entry)?;
        if tag == wanted {
            return read(entry.wrapping_add(8));
        }
        if tag == u64::from(DT_NULL) {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_objects_of_this_process_begin_with_itself_and_hold_the_c_library() {
        let Some(Objects::Dynamic(objects)) = objects("/proc/self".as_ref()) else {
            panic!("a dynamic program");
        };
        let maps = fs::read_to_string("/proc/self/maps").expect("own mappings");
        let starts_with = |load: u64, name: &str| {
            maps.lines().any(|line| line.starts_with(&format!("{load:x}-")) && line.ends_with(name))
        };
        let exe = std::env::current_exe().expect("a test has a file");
        assert!(starts_with(objects[0], exe.to_str().expect("text")), "{objects:x?}\n{maps}");
        assert!(objects.iter().any(|&load| starts_with(load, "libc.so.6")), "{objects:x?}\n{maps}");
    }

    #[test]
    fn a_list_that_bites_its_tail_ends() {
        // AT_PHDR 0x1000, AT_PHNUM 2: PT_INTERP, PT_DYNAMIC at 0x2000; DT_DEBUG 0x3000; r_map 0x4000, its own next.
        let auxv: Vec<u8> =
            [AT_PHDR, 0x1000, AT_PHNUM, 2].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let read = |addr: u64| {
            Some(match addr {
                0x1000 => PT_INTERP.into(),
                0x1038 => PT_DYNAMIC.into(),
                0x1048 => 0x2000,
                0x2000 => DT_DEBUG.into(),
                0x2008 => 0x3000,
                0x3008 | 0x4018 => 0x4000,
                _ => 0,
            })
        };
        let Some(Objects::Dynamic(objects)) = read_objects(&auxv, read) else { panic!("a dynamic program") };
        assert_eq!(objects.len(), OBJECTS_MAX);
    }

    #[test]
    fn bytes_that_make_no_sense_are_no_objects() {
        assert_eq!(read_objects(&[], |_| None), None);
        let auxv: Vec<u8> =
            [AT_PHDR, 0, AT_PHNUM, u64::MAX].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(read_objects(&auxv, |_| None), None);
        assert_eq!(read_objects(&auxv, |_| Some(7)), Some(Objects::Static));
    }
}
