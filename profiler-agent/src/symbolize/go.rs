//! Addresses of Go programs by the table that their own runtime uses. Nothing is mapped or kept: a look-up is some tens of
//! short reads.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::NewFrame;
use super::pclntab::{GoFunction, Module, Pclntab, ReadAt};
use crate::executable::{Executable, GoTable};

/// Whether an executable has a table that is to be preferred to symbols and DWARF: it tells of inlined calls too, or
/// there is no DWARF.
pub(super) fn has_table(executable: &Executable) -> bool {
    let tells_more = |table: &GoTable| table.trees_at.is_some() || !executable.symbols().has_debug_info;
    executable.go_table().is_some_and(tells_more)
}

/// The table of an executable that has one of those.
pub(super) fn table(executable: &Executable) -> Option<Pclntab<Part<'_>>> {
    let GoTable { range, text, trees_at } = executable.go_table().filter(|_| has_table(executable))?.clone();
    Pclntab::new(Part { file: executable.file(), range }, Module { text: text.0, trees_at })
}

/// The frames at an address, innermost first; `None` where no Go function is.
pub(super) fn frames(table: &Pclntab<Part<'_>>, addr: u64) -> Option<Vec<NewFrame>> {
    let frames: Vec<_> = table.find(addr).into_iter().map(frame).collect();
    (!frames.is_empty()).then_some(frames)
}

fn frame(function: GoFunction) -> NewFrame {
    let GoFunction { name, entry: _, file, line, start_line } = function;
    NewFrame { function: name.clone(), system_name: name, file, line, start_line, ..NewFrame::default() }
}

/// A part of a file.
#[derive(Debug)]
pub(super) struct Part<'f> {
    file: &'f File,
    range: Range<u64>,
}

impl ReadAt for Part<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        let at = self.range.start.checked_add(offset)?;
        let left = usize::try_from(self.range.end.checked_sub(at)?).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        self.file.read_at(buffer.get_mut(..room)?, at).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;
    use crate::executable::testing::{read, run};

    const PROGRAM: &str = "package main

import \"os\"

//go:noinline
func hot(n int) int {
	return inlined(n) + 1
}

func inlined(n int) int {
	sum := 0
	for i := range n {
		sum += i * i
	}
	return sum
}

func main() {
	println(hot(len(os.Args)))
}
";

    fn build(dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
        let source = dir.join("main.go");
        std::fs::write(&source, PROGRAM).unwrap();
        let path = dir.join(name);
        run(Command::new("go").arg("build").args(flags).arg("-o").arg(&path).arg(&source));
        path
    }

    /// Address, file's last part and line of each instruction of a function, as Go's own tool has them.
    fn instructions(path: &Path, function: &str) -> Vec<(u64, String, u32)> {
        let output = Command::new("go").args(["tool", "objdump", "-s", function]).arg(path).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let parse = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            let (file, number) = words.next()?.rsplit_once(':')?;
            let addr = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
            Some((addr, file.to_owned(), number.parse().ok()?))
        };
        text.lines().filter_map(parse).collect()
    }

    #[test]
    fn a_stripped_program_is_named_as_the_tools_name_the_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        let whole = build(dir.path(), "whole", &[]);
        let stripped = build(dir.path(), "stripped", &["-ldflags", "-s -w"]);
        let pie = build(dir.path(), "pie", &["-ldflags", "-s -w", "-buildmode=pie"]);
        for path in [&stripped, &pie] {
            let executable = read(path).unwrap();
            assert!(!executable.symbols().has_debug_info);
            table(&executable).expect("a Go program has its table");
        }
        // Stripping moves nothing: the addresses of the whole program are those of the stripped one.
        let executable = read(&stripped).unwrap();
        let table = table(&executable).unwrap();
        let mut functions = BTreeMap::new();
        for (addr, file, line) in instructions(&whole, "^main\\.") {
            let frames = frames(&table, addr).unwrap_or_else(|| panic!("{addr:#x} has no name"));
            let innermost = frames.first().unwrap();
            assert_eq!(
                (innermost.file.rsplit('/').next().unwrap(), innermost.line),
                (&*file, line),
                "{addr:#x}"
            );
            let names: Vec<_> = frames.iter().map(|frame| frame.function.clone()).collect();
            *functions.entry(names).or_insert(0) += 1;
        }
        let has = |names: &[&str]| functions.keys().any(|found| found == names);
        assert!(
            has(&["main.hot"]) && has(&["main.main"]) && has(&["main.inlined", "main.hot"]),
            "{functions:?}"
        );
        assert_eq!(frames(&table, 0), None);
        assert_eq!(frames(&table, u64::MAX), None);
    }

    #[test]
    fn every_function_symbol_of_the_whole_program_has_its_name_in_the_stripped_one() {
        let dir = tempfile::tempdir().unwrap();
        let whole = build(dir.path(), "whole", &[]);
        let executable = read(&build(dir.path(), "stripped", &["-ldflags", "-s -w"])).unwrap();
        let table = table(&executable).unwrap();
        let output = Command::new("go").args(["tool", "nm"]).arg(&whole).output().unwrap();
        let symbols = String::from_utf8(output.stdout).unwrap();
        let mut checked = 0;
        for line in symbols.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(addr), Some("T" | "t"), Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            // Not functions, but where code of a kind begins and ends.
            if ["runtime.text", "runtime.etext"].contains(&name) || name.starts_with("go:") {
                continue;
            }
            let addr = u64::from_str_radix(addr, 16).unwrap();
            let frames = frames(&table, addr).unwrap_or_else(|| panic!("{name} has no name"));
            let found = &frames.last().unwrap().function;
            // The table leaves type arguments out; symbols say which calling convention they have, and the tool writes
            // a point for the middle dot.
            let plain = name.split('[').next().unwrap().trim_end_matches(".abi0");
            assert_eq!(
                found.split('[').next().unwrap().replace('·', "."),
                plain.replace('·', "."),
                "{addr:#x}"
            );
            checked += 1;
        }
        assert!(checked > 1000, "{checked} functions");
    }
}
