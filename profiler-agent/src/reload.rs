//! Changes of the configuration while the agent runs: what is new in the file, and which of it can take effect.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::config::{Config, ConfigError, Key, Sources};

/// The configuration as it runs, and where it came from.
#[derive(Debug)]
pub(crate) struct Reloader {
    sources: Sources,
    running: Config,
    watch: Option<Watch>,
}

/// What a new configuration changes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// Keys that take effect.
    pub(crate) live: Vec<Key>,
    /// Keys that would need a restart; those of the running configuration stay.
    pub(crate) after_restart: Vec<Key>,
}

impl Reloader {
    /// `running` was loaded from `sources`.
    pub(crate) fn new(sources: Sources, running: Config) -> Self {
        let watch = sources.file().map(Watch::new);
        Self { sources, running, watch }
    }

    /// The configuration as it runs.
    pub(crate) fn running(&self) -> &Config {
        &self.running
    }

    /// As `--print-config` shows it. The text of what runs when the file has been broken meanwhile.
    pub(crate) fn show(&self) -> String {
        self.sources.show(&self.running).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// Whether the file has changed since the last question, and has come to rest.
    pub(crate) fn file_has_changed(&mut self) -> bool {
        self.watch.as_mut().is_some_and(Watch::has_changed)
    }

    /// Reads the file again. One that is not accepted, by `check` neither, changes nothing.
    pub(crate) fn reload(
        &mut self,
        check: impl FnOnce(&Config) -> Result<(), ConfigError>,
    ) -> Result<Change, ConfigError> {
        let new = self.sources.load()?;
        check(&new)?;
        let (running, change) = merge(&self.running, new);
        self.running = running;
        Ok(change)
    }
}

/// The configuration that runs on: the old one with the new values of the keys that can change while it runs. The
/// supervisor makes each of them take effect.
fn merge(old: &Config, new: Config) -> (Config, Change) {
    let Config { frequency_hz, enabled, .. } = new;
    let (labels, log, heap) = (new.labels.clone(), new.log.clone(), new.heap.clone());
    let (targets, profiles) = (new.targets.clone(), new.profiles.clone());
    let running = Config { frequency_hz, labels, log, enabled, heap, targets, profiles, ..old.clone() };
    let change = Change { live: changed(old, &running), after_restart: changed(&running, &new) };
    (running, change)
}

fn changed(old: &Config, new: &Config) -> Vec<Key> {
    let mut keys: Vec<_> = old
        .values()
        .into_iter()
        .zip(new.values())
        .filter(|(old, new)| old != new)
        .map(|((key, _), _)| key)
        .collect();
    // What is a secret of these is not in their values.
    let secrets = [
        ("upload", old.uploads != new.uploads),
        ("token_file", old.token != new.token),
        ("backend_token_file", old.backend_token != new.backend_token),
    ];
    for (key, has_changed) in secrets {
        if has_changed && !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// Asks the file system again and again, which sees every way to change a file: writing, replacing, and links to
/// directories that are swapped, as Kubernetes does for a ConfigMap.
#[derive(Debug)]
struct Watch {
    path: PathBuf,
    /// What was read.
    settled: Option<Stamp>,
    /// What the last question found.
    last: Option<Stamp>,
}

/// Identity and state of a file behind all links: device, inode, modification in seconds and nanoseconds, size.
type Stamp = (u64, u64, i64, i64, u64);

impl Watch {
    fn new(path: &Path) -> Self {
        let now = stamp(path);
        Self { path: path.to_owned(), settled: now, last: now }
    }

    /// Two questions in a row must find the same: an editor may be between emptying the file and writing it, or between
    /// removing and replacing it.
    fn has_changed(&mut self) -> bool {
        let now = stamp(&self.path);
        let rests = now == self.last;
        self.last = now;
        let has_changed = rests && now != self.settled;
        if has_changed {
            self.settled = now;
        }
        has_changed
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let file = fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.size()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{config::tests::sources, ledger::ProfileType};

    struct Case {
        directory: tempfile::TempDir,
        reloader: Reloader,
    }

    impl Case {
        fn new(file: &str) -> Self {
            Self::with_flags(file, &[])
        }

        fn with_flags(file: &str, flags: &[&str]) -> Self {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let path = directory.path().join("agent.toml");
            fs::write(&path, file).expect("write the file");
            let path = path.to_str().expect("a plain path");
            let sources = sources(&[&["--config", path], flags].concat());
            let running = sources.load().expect("valid");
            Self { directory, reloader: Reloader::new(sources, running) }
        }

        fn write(&self, file: &str) {
            fs::write(self.directory.path().join("agent.toml"), file).expect("write the file");
        }

        #[track_caller]
        fn check(&mut self, file: &str, live: &[Key], after_restart: &[Key]) {
            self.write(file);
            let change = self.reloader.reload(|_| Ok(())).expect("accepted");
            assert_eq!((change.live, change.after_restart), (live.to_vec(), after_restart.to_vec()));
        }

        /// Changes seen by so many questions.
        fn changes(&mut self, questions: usize) -> usize {
            (0..questions).filter(|_| self.reloader.file_has_changed()).count()
        }
    }

    #[test]
    fn what_can_change_changes_and_the_rest_waits_for_a_restart() {
        let mut case = Case::new("");
        case.check(
            "frequency = 99\nlog = \"debug\"\nenabled = false\nlabels = {a = \"b\"}\n",
            &["frequency", "labels", "log", "enabled"],
            &[],
        );
        assert!(!case.reloader.running().enabled);
        case.check(
            "node = \"x\"\nlisten = \"127.0.0.1:9\"\n",
            &["frequency", "labels", "log", "enabled"],
            &["listen", "node"],
        );
        assert_ne!(case.reloader.running().node, "x");
        case.check("", &[], &[]);
    }

    /// The keys that can change at run time: of a file in which every key has another value.
    pub(crate) fn live_keys() -> Vec<Key> {
        let new = "frequency = 7\nlabels = { a = \"b\" }\nlog = \"warn\"\nenabled = false\nwindow = \"3s\"\n\
                   listen = \"127.0.0.1:1\"\nbackend_listen = \"127.0.0.1:2\"\ndata_dir = \"/x\"\nnode = \"x\"\n\
                   unwind = \"frame-pointers\"\nupload = [\"http://h/\"]\nlog_format = \"json\"\ninstance = \"i\"\n\
                   metrics_listen = \"127.0.0.1:3\"\nrun_dir = \"/y\"\nallow_kernel = true\nprofiles = []\n\
                   heap_budget = \"2%\"\ntarget_default = false\n[[target]]\npid = 1\n[[heap]]\nmatch = \"pid=7\"\n";
        let mut case = Case::new("");
        case.write(new);
        case.reloader.reload(|_| Ok(())).expect("accepted").live
    }

    #[test]
    fn what_the_machine_cannot_do_is_refused_and_changes_nothing() {
        let mut case = Case::new("frequency = 7\n");
        case.write("frequency = 8\n[[target]]\ncgroup = \"/x\"\n");
        let refuse = |new: &Config| {
            assert_eq!(new.targets.list().len(), 1);
            Err(ConfigError::new("target", "/x", "accepted: a pid".to_owned()))
        };
        assert!(case.reloader.reload(refuse).is_err());
        assert_eq!(
            (case.reloader.running().frequency_hz, case.reloader.running().targets.list().len()),
            (7, 0)
        );
        case.check("frequency = 8\n[[target]]\ncgroup = \"/x\"\n", &["frequency", "target"], &[]);
        case.check("frequency = 8\nprofiles = []\n", &["target", "profiles"], &[]);
        assert!(!case.reloader.running().takes(ProfileType::Cpu));
    }

    #[test]
    fn new_credentials_are_a_change_though_no_value_shows_them() {
        let mut case = Case::new("upload = [\"https://u:one@h/\"]\n");
        case.check("upload = [\"https://u:two@h/\"]\n", &[], &["upload"]);
    }

    #[test]
    fn a_flag_stays_what_it_is_whatever_the_file_says() {
        let mut case = Case::with_flags("", &["--log", "warn"]);
        case.check("log = \"debug\"\n", &[], &[]);
    }

    #[test]
    fn a_file_that_is_not_accepted_changes_nothing() {
        let mut case = Case::new("log = \"debug\"\n");
        for bad in [
            "log = \"a=b=c\"\n",
            "enabled = \"no\"\n",
            "lgo = \"warn\"\n",
            "[",
            "frequency = 0\nenabled = false\n",
        ] {
            case.write(bad);
            let error = case.reloader.reload(|_| Ok(())).expect_err("refused").to_string();
            assert!(!error.contains('\n'), "{error}");
            assert_eq!(
                (case.reloader.running().log.as_str(), case.reloader.running().enabled),
                ("debug", true)
            );
        }
        case.check("log = \"warn\"\n", &["log"], &[]);
    }

    #[test]
    fn every_way_to_change_a_file_is_seen_once() {
        let mut case = Case::new("");
        let path = case.directory.path().join("agent.toml");
        assert_eq!(case.changes(3), 0);
        case.write("enabled = false\n");
        assert_eq!(case.changes(3), 1, "written");
        let other = case.directory.path().join("other");
        fs::write(&other, "enabled = true\n").expect("write");
        fs::rename(&other, &path).expect("rename");
        assert_eq!(case.changes(3), 1, "replaced");
        fs::remove_file(&path).expect("remove");
        assert_eq!(case.changes(3), 1, "removed");
        case.reloader.reload(|_| Ok(())).expect_err("nothing to read");
        // As the kubelet does: file -> ..data/file, ..data -> a directory.
        for version in ["v1", "v2"] {
            let data = case.directory.path().join(version);
            fs::create_dir(&data).expect("create");
            fs::write(data.join("agent.toml"), format!("log = \"{version}\"\n")).expect("write");
        }
        let data = case.directory.path().join("..data");
        symlink("v1", &data).expect("link");
        symlink("..data/agent.toml", &path).expect("link");
        assert_eq!(case.changes(3), 1, "linked");
        let swap = case.directory.path().join("..swap");
        symlink("v2", &swap).expect("link");
        fs::rename(&swap, &data).expect("rename");
        assert_eq!(case.changes(3), 1, "swapped");
    }

    #[test]
    fn a_file_in_the_making_is_not_read() {
        let mut case = Case::new("");
        for length in 1..4 {
            case.write(&"#".repeat(length));
            assert_eq!(case.changes(1), 0, "{length}");
        }
        assert_eq!(case.changes(1), 1);
    }
}
