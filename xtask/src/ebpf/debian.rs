//! Debian's rust-src package, fetched without a change to the machine's own package lists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::command;

/// The suite that has a rust-src as new as the pinned nightly.
const SUITE: &str = "sid";

/// Downloads and unpacks rust-src under `into`.
pub(super) fn download_rust_src(into: &Path) -> Result<()> {
    ensure!(
        ["apt-get", "dpkg-deb"].into_iter().all(command::is_installed),
        "apt-get or dpkg-deb is not installed"
    );
    let mirror = mirror().context("no Debian mirror among the machine's package sources")?;
    let list = into.join("sources.list");
    let lists = into.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    fs::write(&list, format!("deb [signed-by={}] {} {SUITE} main\n", mirror.key, mirror.uri))?;
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.current_dir(into).arg("-q").args(["-o", "Dir::Etc::sourceparts=-"]);
        apt.arg("-o").arg(format!("Dir::Etc::sourcelist={}", list.display()));
        apt.arg("-o").arg(format!("Dir::State::Lists={}", lists.display()));
        apt.args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]).args(arguments);
        command::run(&mut apt)
    };
    apt(&["update"])?;
    apt(&["download", "rust-src"])?;
    let package = fs::read_dir(into)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get left no package")?;
    command::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(into))
}

/// Where the machine gets Debian's packages from, and the key that signs them.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    key: String,
}

fn mirror() -> Option<Mirror> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path()),
    );
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).find_map(|text| debian_mirror(&text))
}

/// The first mirror of Debian itself in a sources file of either of apt's formats (sources.list(5)).
fn debian_mirror(text: &str) -> Option<Mirror> {
    let uri = text.lines().filter(|line| line.starts_with("URIs:") || line.starts_with("deb ")).find_map(
        |line| {
            line.split_whitespace()
                .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        },
    )?;
    let key = text
        .lines()
        .find_map(|line| line.strip_prefix("Signed-By:"))
        .map(str::trim)
        .filter(|key| key.starts_with('/'))
        .unwrap_or("/usr/share/keyrings/debian-archive-keyring.gpg");
    Some(Mirror { uri: uri.to_owned(), key: key.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, uri: Option<&str>) {
        assert_eq!(debian_mirror(text).map(|mirror| mirror.uri).as_deref(), uri, "{text}");
    }

    #[test]
    fn mirror_is_found_in_both_formats_of_sources() {
        check(
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n",
            Some("http://mirror.example/debian"),
        );
        check(
            "deb [arch=amd64] http://mirror.example/debian/ trixie main\n",
            Some("http://mirror.example/debian/"),
        );
    }

    #[test]
    fn security_and_foreign_sources_are_no_mirror() {
        check("URIs: http://mirror.example/debian-security\n", None);
        check("deb http://mirror.example/ubuntu noble main\n", None);
        check("# deb http://mirror.example/debian sid main\n", None);
    }
}
