//! Executables that nobody has seen before: compiled, run and removed, one after the other.
//!
//! A profiler that names and unwinds natively has to read each of them, and the compilers, which are large.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::UNIX_EPOCH,
};

use anyhow::{Context as _, Result, bail};

use crate::command;

/// Of so many executables one is Rust's, whose compiler has 300 MB of libraries.
const RUST_EVERY: u32 = 4;

/// Functions of each executable, which all burn in turn.
const FUNCTIONS: u32 = 40;

/// Rounds of each function's loop: the program takes some 100 ms of CPU time.
const STEPS: u32 = 1_000_000;

/// Programs so far, of all cases.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A thread that compiles and runs until it is dropped.
pub(super) struct Compilers {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU32>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Compilers {
    pub(super) fn start(work: &Path) -> Result<Self> {
        let folder = work.join("executables");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let (stop, made) = (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default());
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&made));
        let thread = thread::spawn(move || {
            while !seen.load(Relaxed) {
                Source::next().make_and_run(&folder)?;
                count.fetch_add(1, Relaxed);
            }
            Ok(())
        });
        Ok(Self { stop, made, thread: Some(thread) })
    }

    /// Executables so far.
    pub(super) fn made(&self) -> u32 {
        self.made.load(Relaxed)
    }

    /// Fails when a compiler has failed.
    pub(super) fn check(&self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            bail!("compiling has ended; its error is above");
        }
        Ok(())
    }
}

impl Drop for Compilers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("compile: {error:#}");
        }
    }
}

/// A program unlike all others, those of earlier runs too, whose names a profiler may have kept: its name is in those of
/// its functions.
struct Source {
    name: String,
    is_rust: bool,
}

impl Source {
    fn next() -> Self {
        let number = NEXT.fetch_add(1, Relaxed);
        let now_ns = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
        Self { name: format!("made_{number}_{now_ns}"), is_rust: number % RUST_EVERY == RUST_EVERY - 1 }
    }

    fn text(&self) -> String {
        let names: Vec<String> = (0..FUNCTIONS).map(|at| format!("{}_{at}", self.name)).collect();
        let mut text = String::new();
        for name in &names {
            let _ = match self.is_rust {
                true => writeln!(
                    text,
                    "#[inline(never)] fn {name}(mut x: u64) -> u64 {{ \
                     for _ in 0..{STEPS} {{ x = std::hint::black_box(x.wrapping_mul(25214903917) + 11); }} x }}"
                ),
                false => writeln!(
                    text,
                    "__attribute__((noinline)) static unsigned long {name}(unsigned long x) {{ \
                     for (volatile int i = 0; i < {STEPS}; i++) x = x * 25214903917u + 11; return x; }}"
                ),
            };
        }
        let calls: String = names.iter().map(|name| format!("x = {name}(x); ")).collect();
        let _ = match self.is_rust {
            true => {
                write!(text, "fn main() {{ let mut x = 1; {calls}std::process::exit(i32::from(x == 0)) }}")
            }
            false => write!(text, "int main(void) {{ unsigned long x = 1; {calls}return x == 0; }}"),
        };
        text
    }

    fn make_and_run(&self, folder: &Path) -> Result<()> {
        let (source, program) = self.write(folder)?;
        let mut compiler = match self.is_rust {
            true => Command::new("rustc"),
            false => Command::new("cc"),
        };
        // Debug information, as developers have it.
        compiler.args(["-O", "-g", "-o"]).arg(&program).arg(&source).stdin(Stdio::null());
        command::run(&mut compiler)?;
        command::run(Command::new(&program).stdin(Stdio::null()))?;
        for file in [source, program] {
            fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
        }
        Ok(())
    }

    /// The source file and where its program is to be.
    fn write(&self, folder: &Path) -> Result<(PathBuf, PathBuf)> {
        let program = folder.join(&self.name);
        let source = program.with_extension(if self.is_rust { "rs" } else { "c" });
        fs::write(&source, self.text()).with_context(|| format!("write {}", source.display()))?;
        Ok((source, program))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_unlike_each_other_and_some_are_of_rust() {
        let made: Vec<Source> = (0..2 * RUST_EVERY).map(|_| Source::next()).collect();
        let mut texts: Vec<String> = made.iter().map(Source::text).collect();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), made.len());
        assert!(made.iter().any(|source| source.is_rust) && made.iter().any(|source| !source.is_rust));
    }

    #[test]
    fn a_program_is_made_run_and_removed() {
        let folder = std::env::temp_dir().join(format!("xtask-compile-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        for is_rust in [false, true] {
            Source { is_rust, ..Source::next() }.make_and_run(&folder).expect("its compiler");
        }
        let left = fs::read_dir(&folder).expect("a folder").count();
        fs::remove_dir_all(&folder).expect("it was made here");
        assert_eq!(left, 0);
    }
}
