//! `profiler-ebpf/prebuilt/inputs.sha256`: what the committed objects were built from.
//!
//! A line is `tool NAME VALUE`, `source HASH PATH` or `object HASH FILE`; the sources are all that a build reads from
//! the checkout.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{project, sha256};

/// Folders whose sources go into the objects. profiler-common's tests do not.
const SOURCE_DIRS: [&str; 3] = ["profiler-common/src", "profiler-ebpf/src", "profiler-ebpf/.cargo"];

/// Single files that go into the objects.
const SOURCE_FILES: [&str; 6] = [
    "profiler-common/Cargo.toml",
    "profiler-common/build.rs",
    "profiler-ebpf/Cargo.toml",
    "profiler-ebpf/Cargo.lock",
    "profiler-ebpf/build.rs",
    "profiler-ebpf/rust-toolchain.toml",
];

/// The part of the workspace's manifest that profiler-common inherits; the rest changes with every dependency.
const INHERITED: &str = "[workspace.package]";

/// Name to value; names are unique within their kind.
type Lines = BTreeMap<String, String>;

/// Everything that decides the bytes of the objects, and the objects' own hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inputs {
    /// Tool to version, or to the hash of its files.
    pub(super) tools: Lines,
    /// Path below the checkout's top to hash.
    pub(super) sources: Lines,
    /// File name in `prebuilt/` to hash.
    pub(super) objects: Lines,
}

impl Inputs {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("read {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut inputs = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.splitn(3, ' ');
            let (Some(kind), Some(first), Some(rest)) = (words.next(), words.next(), words.next()) else {
                bail!("line of fewer than 3 words: {line}");
            };
            let (lines, name, value) = match kind {
                "tool" => (&mut inputs.tools, first, rest),
                "source" => (&mut inputs.sources, rest, first),
                "object" => (&mut inputs.objects, rest, first),
                _ => bail!("unknown kind of line: {line}"),
            };
            lines.insert(name.to_owned(), value.to_owned());
        }
        Ok(inputs)
    }
}

impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tools, sources, objects } = self;
        writeln!(
            f,
            "# What the objects beside this file were built from, written by `cargo xtask build-ebpf`."
        )?;
        tools.iter().try_for_each(|(name, value)| writeln!(f, "tool {name} {value}"))?;
        sources.iter().try_for_each(|(path, hash)| writeln!(f, "source {hash} {path}"))?;
        objects.iter().try_for_each(|(file, hash)| writeln!(f, "object {hash} {file}"))
    }
}

/// The sources under `root` as they are now, by path.
pub(super) fn sources(root: &Path) -> Result<Lines> {
    let mut paths = Vec::new();
    for dir in SOURCE_DIRS.map(Path::new).into_iter().filter(|dir| root.join(dir).is_dir()) {
        paths.extend(project::files_under(&root.join(dir))?.into_iter().map(|file| dir.join(file)));
    }
    paths.extend(SOURCE_FILES.map(PathBuf::from).into_iter().filter(|file| root.join(file).is_file()));
    let hashes = sha256::of_files(root, &paths)?;
    let mut lines: Lines = paths.iter().map(|path| path.display().to_string()).zip(hashes).collect();
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("read Cargo.toml")?;
    lines.insert(format!("Cargo.toml {INHERITED}"), sha256::of_bytes(inherited(&manifest).as_bytes())?);
    Ok(lines)
}

/// The lines of the manifest's `[workspace.package]` table.
fn inherited(manifest: &str) -> String {
    let lines = manifest.lines().skip_while(|line| line.trim() != INHERITED);
    let table = lines.enumerate().take_while(|(index, line)| *index == 0 || !line.starts_with('['));
    table.filter(|(_, line)| !line.trim().is_empty()).fold(String::new(), |mut text, (_, line)| {
        let _ = writeln!(text, "{line}");
        text
    })
}

/// One line for each name whose value differs between `recorded` and `present`.
pub(super) fn differences(recorded: &Lines, present: &Lines) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = recorded.keys().chain(present.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| match (recorded.get(name), present.get(name)) {
            (Some(recorded), Some(present)) if recorded == present => None,
            (Some(recorded), Some(present)) => Some(format!("{name}: recorded {recorded}, is {present}")),
            (Some(_), None) => Some(format!("{name}: recorded, is gone")),
            (None, _) => Some(format!("{name}: new, not recorded")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pairs: &[(&str, &str)]) -> Lines {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let inputs = Inputs {
            tools: lines(&[("flags", "-C a -C b"), ("rustc", "1.97.0")]),
            sources: lines(&[("a folder/main.rs", "00ff")]),
            objects: lines(&[("profiler-x86_64.bpf.o", "11ee")]),
        };
        assert_eq!(Inputs::parse(&inputs.to_string()).expect("own format"), inputs);
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        let recorded = lines(&[("same", "1"), ("changed", "1"), ("gone", "1")]);
        let present = lines(&[("same", "1"), ("changed", "2"), ("new", "1")]);
        let expect = ["changed: recorded 1, is 2", "gone: recorded, is gone", "new: new, not recorded"];
        assert_eq!(differences(&recorded, &present), expect);
    }

    #[test]
    fn a_dependency_line_is_no_input_and_the_edition_is() {
        let manifest =
            "[workspace]\n\n[workspace.package]\nedition = \"2024\"\n\n[workspace.dependencies]\na = \"1\"\n";
        assert_eq!(inherited(manifest), "[workspace.package]\nedition = \"2024\"\n");
    }
}
