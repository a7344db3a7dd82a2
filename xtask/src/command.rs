//! Running other programs: every failure names the command line.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Runs `command` with our own standard streams; an exit code other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", line(command)))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// Runs `command` and returns what it wrote to standard output; standard error is ours.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("start {}", line(command)))?;
    if !output.status.success() {
        bail!("{}: {}", line(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{}: output is not UTF-8", line(command)))
}

/// Runs `command` without showing anything; `None` when it cannot be started or fails.
pub(crate) fn probe(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether `program` is found in `PATH`.
pub(crate) fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Runs `command` with its standard output shown line by line, each of which `each` sees; returns whether it succeeded.
pub(crate) fn run_reading(command: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {}", line(command)))?;
    let stdout = BufReader::new(child.stdout.take().expect("standard output was piped"));
    for output in stdout.split(b'\n') {
        let output = output.with_context(|| format!("read from {}", line(command)))?;
        let output = String::from_utf8_lossy(&output);
        println!("{output}");
        each(&output);
    }
    Ok(child.wait()?.success())
}

/// Whether we run with user id 0.
pub(crate) fn is_root() -> bool {
    probe(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0")
}

/// The cargo that started us, in the checkout's top folder.
pub(crate) fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(crate::project::root());
    // What cargo says of this program. Build scripts ask for some of it (ring's does): with a value here and none when cargo
    // is called by hand, they and all that depends on them would be built anew by turns.
    let is_ours = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    };
    std::env::vars_os().map(|(name, _)| name).filter(|name| is_ours(name)).for_each(|name| {
        command.env_remove(name);
    });
    command
}

/// The command as a shell would take it, for messages.
fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words: Vec<&OsStr> = std::iter::once(program).chain(command.get_args()).collect();
    words.join(OsStr::new(" ")).to_string_lossy().into_owned()
}
