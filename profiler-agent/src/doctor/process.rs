//! One process: where the unwind information and the names of each of its mappings come from.

use std::{fmt, path::Path, sync::Arc};

use anyhow::bail;
use serde::Serialize;

use crate::{
    executable::{Executable, ExecutableCache},
    languages::{self, Language},
    process::{Backing, GeneratedCode, ImageReader, Mapping, PerfMapError},
    unwind,
};

/// Executables of one process that are open at once.
const EXECUTABLES_MAX: usize = 4096;

/// What is known of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pid: u32,
    /// Languages whose code runs in it, and how their functions get names.
    languages: Vec<Interpreted>,
    mappings: Vec<Sources>,
}

/// A language whose runtime the process has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Interpreted {
    language: String,
    names: String,
}

/// Where the agent gets from what for one executable range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Sources {
    start: String,
    end: String,
    file: String,
    /// Finds the callers of its code.
    unwinding: String,
    /// Tells the functions of its code.
    names: String,
}

/// Looks at a process.
pub(crate) fn examine(proc_root: &Path, pid: u32) -> anyhow::Result<Report> {
    let mut images = ImageReader::new(proc_root.to_owned(), Arc::new(ExecutableCache::new(EXECUTABLES_MAX)));
    if images.start_ticks(pid).is_none() {
        bail!("there is no process {pid}");
    }
    let mappings = images.mappings(pid);
    if mappings.is_empty() {
        bail!("process {pid} has no code of its own (a kernel thread), or its mappings may not be read");
    }
    let languages = interpreted(proc_root, pid, &mappings);
    Ok(Report { pid, languages, mappings: mappings.iter().map(sources).collect() })
}

fn interpreted(proc_root: &Path, pid: u32, mappings: &[Mapping]) -> Vec<Interpreted> {
    let mut found: Vec<&Language> = Vec::new();
    for mapping in mappings {
        let Backing::Executable(executable) = &mapping.backing else { continue };
        found.extend(languages::of_file(&executable.name()).filter(|language| !found.contains(language)));
    }
    let map = GeneratedCode::new(pid, 0, "").open_perf_map(proc_root);
    let names = |language: &Language| match &map {
        Ok(_) => "it writes a perf map".to_owned(),
        Err(PerfMapError::Open(_)) => format!("none: {}", language.switch),
        Err(error) => format!("none: {error}"),
    };
    found
        .iter()
        .map(|language| Interpreted { language: language.name.to_owned(), names: names(language) })
        .collect()
}

fn sources(mapping: &Mapping) -> Sources {
    let range = mapping.range();
    let (file, unwinding, names) = match &mapping.backing {
        Backing::Executable(executable) => {
            (executable.path().display().to_string(), unwinding(executable), names(executable))
        }
        Backing::Anonymous => {
            ("[generated code]".to_owned(), "frame pointers".to_owned(), "none: [jit]".to_owned())
        }
        Backing::Unnamed(name) if **name == *crate::vdso::NAME => {
            (name.to_string(), "its own .eh_frame".to_owned(), "none: [vdso]".to_owned())
        }
        Backing::Unnamed(name) => (
            name.to_string(),
            "frame pointers: the file cannot be used".to_owned(),
            "none: the file cannot be used".to_owned(),
        ),
    };
    let (start, end) = (format!("{:#x}", range.start.0), format!("{:#x}", range.end.0));
    Sources { start, end, file, unwinding, names }
}

fn unwinding(executable: &Executable) -> String {
    match unwind::source_of(executable) {
        Ok((source, rows)) => format!("{source}, {rows} rows"),
        Err(why) => format!("frame pointers: {why}"),
    }
}

fn names(executable: &Executable) -> String {
    let symbols = executable.symbols();
    match (symbols.has_debug_info, symbols.symbol_bytes > 0) {
        (true, _) => "functions, inlined calls, files and lines: DWARF".to_owned(),
        (false, _) if symbols.mini.is_some() => "functions: symbols, and those of .gnu_debugdata".to_owned(),
        (false, true) => "functions: symbols".to_owned(),
        (false, false) if executable.is_go() => "none: the Go program is stripped of its symbols".to_owned(),
        (false, false) => "none: the file is stripped".to_owned(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, languages, mappings } = self;
        writeln!(f, "process {pid}: where callers and names come from")?;
        for Interpreted { language, names } in languages {
            writeln!(f, "functions of {language} code\n  names      {names}")?;
        }
        for Sources { start, end, file, unwinding, names } in mappings {
            writeln!(f, "{start}-{end} {file}\n  unwinding  {unwinding}\n  names      {names}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_tables_and_names() {
        let report = examine("/proc".as_ref(), std::process::id()).expect("a process of our own");
        let exe = std::env::current_exe().expect("its own path").display().to_string();
        let own =
            report.mappings.iter().find(|mapping| mapping.file == exe).expect("its executable is mapped");
        assert!(own.unwinding.starts_with(".eh_frame"), "{own:?}");
        assert!(!own.names.starts_with("none"), "{own:?}");
        assert!(report.mappings.iter().any(|mapping| mapping.file == "[vdso]"), "{report}");
    }

    #[test]
    fn a_process_that_is_not_there_is_said_to_be_not_there() {
        let error = examine("/proc".as_ref(), u32::MAX).expect_err("no such process");
        assert_eq!(error.to_string(), format!("there is no process {}", u32::MAX));
    }
}
