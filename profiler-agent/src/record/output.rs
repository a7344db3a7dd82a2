//! Where a recording is written, and in which form.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs,
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use inferno::flamegraph;
use profiler_pprof::{encode_gzip, proto::Profile};

use super::summary::{Shown, stacks};
use crate::config::ConfigError;

/// The form of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Gzipped profile.proto.
    Pprof,
    /// A flame graph that a browser shows.
    Svg,
    /// `root;caller;function VALUE`, one stack a line: nanoseconds or bytes.
    Folded,
}

/// Where to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Output {
    /// `None`: standard output.
    path: Option<PathBuf>,
    form: Form,
}

impl Output {
    /// Reads a name: its ending says the form.
    ///
    /// # Errors
    /// For another ending.
    pub(super) fn parse(name: &OsStr) -> Result<Self, ConfigError> {
        if name == "-" {
            return Ok(Self { path: None, form: Form::Pprof });
        }
        let text = name.to_string_lossy();
        let form = match text.rsplit_once('.').map(|(_, ending)| ending) {
            Some("gz" | "pprof") if !text.ends_with(".svg.gz") && !text.ends_with(".folded.gz") => {
                Form::Pprof
            }
            Some("svg") => Form::Svg,
            Some("folded" | "txt") => Form::Folded,
            _ => {
                let accepted = "accepted: a name that ends in .pb.gz, .svg or .folded, or -".to_owned();
                return Err(ConfigError::new("output", &text, accepted));
            }
        };
        Ok(Self { path: Some(name.into()), form })
    }

    /// Makes the file before anything is recorded, beside the one it will replace.
    ///
    /// # Errors
    /// When it cannot be made, or when standard output is a terminal.
    pub(super) fn open(&self) -> anyhow::Result<File> {
        let Some(path) = &self.path else {
            if io::stdout().is_terminal() {
                anyhow::bail!("standard output is a terminal: redirect it, or name a file with -o");
            }
            return Ok(File { form: self.form, to: To::Stdout });
        };
        let part = part_of(path);
        let file = fs::File::create_new(&part).with_context(|| format!("create {}", part.display()))?;
        let to = To::Replace { file, part: Part { path: Some(part) }, path: path.clone() };
        Ok(File { form: self.form, to })
    }

    /// The command to type next.
    pub(super) fn next_step(&self) -> String {
        let Some(path) = &self.path else { return "next: go tool pprof -http=: FILE".to_owned() };
        let path = path.display();
        match self.form {
            Form::Pprof => format!("next: go tool pprof -http=: {path}"),
            Form::Svg => format!("next: open {path} in a browser"),
            Form::Folded => format!("next: inferno-flamegraph {path} > flamegraph.svg"),
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => path.display().fmt(f),
            None => f.write_str("standard output"),
        }
    }
}

/// `dir/.name.PID.part`
fn part_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.part", std::process::id()));
    path.with_file_name(name)
}

/// An open file that is not yet what it will be.
#[derive(Debug)]
pub(super) struct File {
    form: Form,
    to: To,
}

#[derive(Debug)]
enum To {
    Stdout,
    Replace { file: fs::File, part: Part, path: PathBuf },
}

/// Deletes the file when it is not used after all.
#[derive(Debug)]
struct Part {
    path: Option<PathBuf>,
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It is in nobody's way.
            let _ = fs::remove_file(path);
        }
    }
}

impl File {
    /// Writes the profile; a file appears under its name when it is whole.
    ///
    /// # Errors
    /// As writing and renaming have them.
    pub(super) fn write(self, profile: &Profile) -> anyhow::Result<()> {
        match self.to {
            To::Stdout => render(self.form, profile, &mut io::stdout().lock()),
            To::Replace { mut file, mut part, path } => {
                render(self.form, profile, &mut file)?;
                file.sync_all().context("write it to disk")?;
                if let Some(from) = part.path.as_ref() {
                    fs::rename(from, &path).context("rename it")?;
                    part.path = None;
                }
                Ok(())
            }
        }
    }
}

fn render(form: Form, profile: &Profile, to: &mut impl Write) -> anyhow::Result<()> {
    match form {
        Form::Pprof => to.write_all(&encode_gzip(profile))?,
        Form::Folded => folded(profile).iter().try_for_each(|line| writeln!(to, "{line}"))?,
        Form::Svg => svg(profile, to)?,
    }
    to.flush()?;
    Ok(())
}

fn svg(profile: &Profile, to: &mut impl Write) -> anyhow::Result<()> {
    let mut options = flamegraph::Options::default();
    let (title, unit) = Shown::of(profile).title();
    title.clone_into(&mut options.title);
    unit.clone_into(&mut options.count_name);
    let lines = folded(profile);
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), to).context("draw the flame graph")
}

/// `process;root;caller;function VALUE`, sorted.
fn folded(profile: &Profile) -> Vec<String> {
    let mut lines: Vec<_> = stacks(profile)
        .map(|stack| {
            let names = stack.process.iter().chain(stack.functions.iter().rev()).copied();
            let names: Vec<_> = names.map(folded_name).collect();
            format!("{} {}", names.join(";"), stack.value)
        })
        .collect();
    lines.sort_unstable();
    lines
}

/// A name without what separates names and lines.
fn folded_name(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c == ';' {
                ':'
            } else if c.is_control() {
                ' '
            } else {
                c
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::summary::tests::profile;

    #[track_caller]
    fn check(name: &str, expect: Option<Form>) {
        assert_eq!(Output::parse(name.as_ref()).ok().map(|output| output.form), expect, "{name}");
    }

    #[test]
    fn the_ending_says_the_form() {
        check("-", Some(Form::Pprof));
        check("a.pb.gz", Some(Form::Pprof));
        check("dir.svg/a.pprof", Some(Form::Pprof));
        check("a.svg", Some(Form::Svg));
        check("a.folded", Some(Form::Folded));
        check("a.svg.gz", None);
        check("a.pdf", None);
        check("profile", None);
    }

    #[test]
    fn folded_stacks_are_root_first_under_their_process() {
        assert_eq!(folded(&profile()), ["app;main;inner: leaf 30", "app;main;main;other 10"]);
    }

    #[test]
    fn the_svg_names_every_function() {
        let mut bytes = Vec::new();
        render(Form::Svg, &profile(), &mut bytes).expect("a flame graph");
        let text = String::from_utf8(bytes).expect("text");
        assert!(text.starts_with("<?xml") && text.contains("inner: leaf"), "{text}");
    }

    #[test]
    fn a_recording_that_fails_leaves_no_file_and_the_old_one_as_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.folded");
        fs::write(&path, "old").expect("a file");
        let output = Output::parse(path.as_os_str()).expect("a form");
        drop(output.open().expect("a file"));
        assert_eq!(fs::read_to_string(&path).expect("text"), "old");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
        output.open().expect("a file").write(&profile()).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("text").lines().count(), 2);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    }
}
