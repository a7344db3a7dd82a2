//! Packages of any of Debian's suites, fetched without a change to the machine's own package lists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::command;

/// The lists of one suite, in a folder of their own.
pub(crate) struct Suite {
    dir: PathBuf,
}

impl Suite {
    /// Fetches the lists of a suite (`sid`, `bookworm`) into `dir`, from where the machine gets its own packages.
    pub(crate) fn fetch(name: &str, dir: &Path) -> Result<Self> {
        ensure!(
            ["apt-get", "dpkg-deb"].into_iter().all(command::is_installed),
            "apt-get or dpkg-deb is not installed"
        );
        let mirror = mirror().context("no Debian mirror among the machine's package sources")?;
        let suite = Self { dir: dir.to_owned() };
        fs::create_dir_all(suite.lists().join("partial"))?;
        fs::write(suite.list(), format!("deb [signed-by={}] {} {name} main\n", mirror.key, mirror.uri))?;
        command::run(suite.apt("apt-get").arg("-qq").arg("update"))?;
        Ok(suite)
    }

    /// The packages that a package depends on, without versions; of alternatives the first.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let record =
            command::output(self.apt("apt-cache").args(["show", "--no-all-versions", "--", package]))?;
        Ok(dependencies(&record))
    }

    /// Downloads a package and unpacks it under `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let download = self.dir.join("download");
        if download.exists() {
            fs::remove_dir_all(&download)?;
        }
        fs::create_dir_all(&download)?;
        command::run(self.apt("apt-get").current_dir(&download).args(["-qq", "download", package]))?;
        let file = fs::read_dir(&download)?.next().context("apt-get left no package")??.path();
        command::run(Command::new("dpkg-deb").arg("-x").arg(file).arg(into))
    }

    /// One of apt's programs, which sees this suite and nothing else.
    fn apt(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        apt.args(["-o", "Dir::Etc::sourceparts=-"]);
        apt.arg("-o").arg(format!("Dir::Etc::sourcelist={}", self.list().display()));
        apt.arg("-o").arg(format!("Dir::State::Lists={}", self.lists().display()));
        apt.args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]);
        apt.args(["-o", "Acquire::Languages=none"]);
        // Else root's downloads are made by a user who may have no way into this checkout.
        apt.args(["-o", "APT::Sandbox::User=root"]);
        apt
    }

    fn list(&self) -> PathBuf {
        self.dir.join("sources.list")
    }

    fn lists(&self) -> PathBuf {
        self.dir.join("lists")
    }
}

/// Names in the field `Depends` of a package's record (deb-control(5)).
fn dependencies(record: &str) -> Vec<String> {
    let fields = record.lines().filter_map(|line| line.strip_prefix("Depends:"));
    let names = fields.flat_map(|field| field.split(',')).filter_map(|one| one.split_whitespace().next());
    names.map(str::to_owned).collect()
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

    #[test]
    fn dependencies_have_no_versions_and_no_alternatives() {
        let record =
            "Package: linux-image-cloud-amd64\nDepends: a-1+deb13 (= 1.2), b | c, d\nPre-Depends: e\n";
        assert_eq!(dependencies(record), ["a-1+deb13", "b", "d"]);
    }

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
