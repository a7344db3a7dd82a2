//! SHA-256 by coreutils: xtask hashes a few hundred files, which is no reason for a dependency.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{command, project};

/// Hash of `bytes`, in hexadecimal digits.
pub(crate) fn of_bytes(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start sha256sum (coreutils)")?;
    // Dropping the pipe at the end of the statement is what ends the program's input.
    child.stdin.take().expect("standard input was piped").write_all(bytes).context("write to sha256sum")?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "sha256sum: {}", output.status);
    digest(&String::from_utf8_lossy(&output.stdout)).context("read sha256sum's output")
}

/// Hashes of `files`, which are paths below `dir`, in the order given.
pub(crate) fn of_files(dir: &Path, files: &[PathBuf]) -> Result<Vec<String>> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let text = command::output(Command::new("sha256sum").current_dir(dir).arg("--").args(files))?;
    let digests: Option<Vec<String>> = text.lines().map(digest).collect();
    let digests = digests.context("read sha256sum's output")?;
    ensure!(digests.len() == files.len(), "sha256sum: {} lines for {} files", digests.len(), files.len());
    Ok(digests)
}

/// One hash over the names and the contents of `files`.
pub(crate) fn of_tree(dir: &Path, files: &[PathBuf]) -> Result<String> {
    let digests = of_files(dir, files)?;
    let listing: String =
        digests.iter().zip(files).map(|(digest, file)| format!("{digest}  {}\n", file.display())).collect();
    of_bytes(listing.as_bytes())
}

/// Hash of one file.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let digests = of_files(project::root(), &[path.to_owned()])?;
    Ok(digests.into_iter().next().expect("one hash for one file"))
}

/// The hash at the start of one of sha256sum's lines, which has a backslash before it when the name is escaped.
fn digest(line: &str) -> Option<String> {
    let digest = line.trim_start_matches('\\').get(..64)?;
    digest.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| digest.to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn hash_is_that_of_the_standard() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(super::of_bytes(b"abc").expect("sha256sum runs"), abc);
    }
}
