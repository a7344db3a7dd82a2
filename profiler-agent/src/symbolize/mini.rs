//! Mini debug information: a symbol table of the functions that the dynamic one does not have, compressed into a section of
//! stripped executables. Fedora and its relatives ship their programs so.
//!
//! Source: Fedora, "Features/MiniDebugInfo"; GDB manual, "MiniDebugInfo": section `.gnu_debugdata`, an ELF file as xz.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::ops::Range;

use lzma_rust2::XzReader;
use rustix::fs::MemfdFlags;

use crate::executable::Elf;

use super::inflate::range;

/// Bytes of the section: that of Chromium would be 12 MB.
const PACKED_BYTES_MAX: u64 = 16 << 20;
/// Bytes that it unfolds to. They are memory of ours while the executable's names are looked up.
pub(super) const BYTES_MAX: u64 = 16 << 20;
/// What the decoder may take while it unfolds: a dictionary of 16 MiB, in KiB. xz takes 8 MiB unless told otherwise.
const DECODER_KIB_MAX: u32 = 17 << 10;

/// An unfolded symbol table, in memory.
#[derive(Debug)]
pub(super) struct MiniSymbols {
    pub(super) file: File,
    pub(super) bytes: u64,
}

/// Unfolds what lies in this range of a file. `None` for what is damaged, beyond the bounds, or anything but a table of symbols.
pub(super) fn unfold(file: &File, section: &Range<u64>) -> Option<MiniSymbols> {
    let packed = section.end.checked_sub(section.start)?;
    let unfolded =
        if packed <= PACKED_BYTES_MAX { unfold_reader(range(file, section)).ok()? } else { return None };
    let symbols = Elf::of(&unfolded.file).ok()?.symbols;
    let is_plain = !symbols.has_debug_info
        && !symbols.names_other_file
        && symbols.compressed.is_empty()
        && symbols.mini.is_none()
        && (1..=BYTES_MAX).contains(&symbols.symbol_bytes);
    is_plain.then_some(unfolded)
}

fn unfold_reader(packed: impl Read) -> io::Result<MiniSymbols> {
    let reader = XzReader::new_mem_limit(packed, false, DECODER_KIB_MAX);
    let mut file = File::from(rustix::fs::memfd_create("mini-symbols", MemfdFlags::CLOEXEC)?);
    let mut limited = reader.take(BYTES_MAX + 1);
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    loop {
        let read = limited.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        bytes += read as u64;
        if bytes > BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        file.write_all(buffer.get(..read).unwrap_or_default())?;
    }
    Ok(MiniSymbols { file, bytes })
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;
    use crate::executable::testing::{compile, run};

    /// As `xz` packs it, with these flags.
    pub(in crate::symbolize) fn xz(bytes: &[u8], flags: &[&str]) -> Vec<u8> {
        let mut xz = Command::new("xz");
        let child = xz.args(flags).args(["-c", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("xz is installed");
        let mut input = child.stdin.take().expect("a pipe");
        let bytes = bytes.to_vec();
        let writer = std::thread::spawn(move || input.write_all(&bytes));
        let output = child.wait_with_output().expect("xz ends");
        writer.join().expect("no panic").expect("xz reads it all");
        output.stdout
    }

    /// Strips a program, and gives it the mini debug information that it would have in Fedora.
    pub(in crate::symbolize) fn strip_to_mini(program: &Path) {
        let symbols = program.with_extension("mini");
        run(Command::new("objcopy").arg("--only-keep-debug").arg("--strip-debug").arg(program).arg(&symbols));
        let packed = program.with_extension("mini.xz");
        std::fs::write(&packed, xz(&std::fs::read(&symbols).expect("it was made"), &[])).expect("write");
        run(Command::new("strip").arg(program));
        let section = format!(".gnu_debugdata={}", packed.display());
        run(Command::new("objcopy").args(["--add-section", &section]).arg(program));
    }

    #[test]
    fn what_unfolds_to_more_than_the_bound_or_needs_a_larger_dictionary_is_refused() {
        let zeros = vec![0; BYTES_MAX as usize + 1];
        assert!(unfold_reader(xz(&zeros[1..], &[]).as_slice()).is_ok_and(|found| found.bytes == BYTES_MAX));
        assert!(unfold_reader(xz(&zeros, &[]).as_slice()).is_err());
        let greedy = xz(&zeros[..1 << 20], &["--lzma2=dict=64MiB"]);
        assert!(unfold_reader(greedy.as_slice()).is_err());
        assert!(unfold_reader(b"no xz".as_slice()).is_err());
    }

    #[test]
    fn what_is_no_table_of_symbols_is_refused() {
        let check = |bytes: &[u8]| {
            let packed = xz(bytes, &[]);
            let file = tempfile::tempfile().expect("a file");
            file.write_all_at(&packed, 7).expect("write");
            unfold(&file, &(7..7 + packed.len() as u64)).is_some()
        };
        assert!(!check(b"text") && !check(&[]));
        let directory = tempfile::tempdir().expect("a directory");
        let program = compile(directory.path(), "program", "int main(void) { return 0; }", &[]);
        assert!(!check(&std::fs::read(&program).expect("it was made")), "a whole program, with its DWARF");
        run(Command::new("strip").arg("--strip-debug").arg(&program));
        assert!(check(&std::fs::read(&program).expect("it is there")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_damaged_stream_makes_the_decoder_panic_or_give_too_much(
            at in 0..600usize, with in any::<u8>(), cut in 0..600usize
        ) {
            static PACKED: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
                let text: Vec<u8> = (0..20_000u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[..2].to_vec()).collect();
                xz(&text, &["--check=none"])
            });
            let mut packed = PACKED.clone();
            if let Some(byte) = packed.get_mut(at) {
                *byte = with;
            }
            packed.truncate(packed.len().saturating_sub(cut));
            if let Ok(found) = unfold_reader(packed.as_slice()) {
                prop_assert!(found.bytes <= BYTES_MAX);
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let header = [0xfd, b'7', b'z', b'X', b'Z', 0, 0, 0];
            let _ = unfold_reader([header.as_slice(), &bytes].concat().as_slice());
            let _ = unfold_reader(bytes.as_slice());
        }
    }
}
