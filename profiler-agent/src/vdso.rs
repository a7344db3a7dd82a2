//! Code that the kernel maps into every process: vdso(7). All 64-bit processes have the same, this one too.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    sync::OnceLock,
};

use object::{Endianness, Object as _, ObjectSymbol as _, SymbolKind, read::elf::ElfFile64};

use crate::process::maps::executable_ranges;

/// Name of its mapping.
pub(crate) const NAME: &str = "[vdso]";
/// What it is called here in processes of 32 bits, which have another.
pub(crate) const NAME_32: &str = "[vdso32]";

/// Its bytes, as this process has them.
///
/// # Errors
/// It is not mapped, or cannot be read.
pub(crate) fn image() -> io::Result<Vec<u8>> {
    let maps = fs::read("/proc/self/maps")?;
    let range = executable_ranges(&maps).find(|entry| entry.path == NAME.as_bytes());
    let range = range.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no vDSO is mapped"))?;
    let bytes = usize::try_from(range.end.0 - range.start.0).unwrap_or(usize::MAX);
    let mut image = vec![0; bytes.min(profiler_unwind::limits::VDSO_BYTES_MAX)];
    File::open("/proc/self/mem")?.read_exact_at(&mut image, range.start.0)?;
    Ok(image)
}

/// The function at a byte of it.
pub(crate) fn function_at(offset: u64) -> Option<&'static str> {
    static FUNCTIONS: OnceLock<Vec<Function>> = OnceLock::new();
    let functions = FUNCTIONS.get_or_init(|| image().map(|image| functions(&image)).unwrap_or_default());
    let behind = functions.partition_point(|function| function.start <= offset);
    let function = functions.get(behind.checked_sub(1)?)?;
    (offset < function.end).then_some(&function.name)
}

#[derive(Debug, PartialEq, Eq)]
struct Function {
    start: u64,
    end: u64,
    name: String,
}

/// By their start. Of several names for one, that by which the C library looks for it: `__vdso_time`, not `time`.
fn functions(image: &[u8]) -> Vec<Function> {
    let Ok(elf) = ElfFile64::<Endianness>::parse(image) else { return Vec::new() };
    let code =
        elf.dynamic_symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition());
    let mut functions: Vec<Function> = code
        .filter_map(|symbol| {
            let start = symbol.address();
            let name = symbol.name().ok()?.to_owned();
            Some(Function { start, end: start.saturating_add(symbol.size()), name })
        })
        .collect();
    functions.sort_by_key(|function| (function.start, !function.name.starts_with("__")));
    functions.dedup_by_key(|function| function.start);
    functions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_this_machine_are_found_by_any_of_their_bytes() {
        let found = functions(&image().expect("a vDSO"));
        assert!(found.iter().any(|function| function.name.contains("clock_gettime")), "{found:?}");
        for Function { start, end, name } in &found {
            assert!(start < end, "{name}");
            assert_eq!(function_at(*start), Some(name.as_str()));
            assert_eq!(function_at(end - 1), Some(name.as_str()));
        }
        assert_eq!(function_at(0), None);
        assert_eq!(function_at(u64::MAX), None);
    }

    #[test]
    fn what_is_no_elf_file_has_no_functions() {
        assert_eq!(functions(b"\x7fELF"), []);
        assert_eq!(functions(&vec![0; 8192]), []);
    }
}
