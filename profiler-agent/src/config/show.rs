//! The configuration as text: every key, its value and where that comes from, without secrets.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use super::{Config, ConfigError, LogFormat, Origin, Sources, Unwind};
use crate::{export::Destination, heap::Rule, targets::Target};

/// A key of the file.
pub(crate) type Key = &'static str;

impl Config {
    /// Keys as in the file, with their values as TOML; `None` for those that have none. The one place that lists them all.
    pub(crate) fn values(&self) -> Vec<(Key, Option<toml::Value>)> {
        let Self {
            frequency_hz,
            cpu_budget,
            // For tests, and no key.
            budget_term: _,
            memory,
            window,
            listen,
            backend_listen,
            data_dir,
            cache_dir,
            debuginfod_urls,
            unwind,
            stack_depth,
            targets,
            uploads,
            node,
            labels,
            heap,
            // For tests, and no key.
            heap_options: _,
            log,
            log_format,
            profiles,
            enabled,
            metrics_listen,
            token,
            run_dir,
            instance,
            allow_kernel,
        } = self;
        let labels: toml::Table =
            labels.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        let uploads: Vec<_> = uploads.iter().map(Destination::name).collect();
        let debuginfod_urls: Vec<_> = debuginfod_urls.iter().map(ToString::to_string).collect();
        let text = |text: String| Some(toml::Value::from(text));
        vec![
            ("frequency", Some(i64::from(*frequency_hz).into())),
            ("cpu_budget", text(cpu_budget.map_or("off".to_owned(), |budget| budget.to_string()))),
            ("memory_limit", text(format!("{}MiB", memory.limit_bytes >> 20))),
            ("window", text(duration(*window))),
            ("listen", text(listen.to_string())),
            ("backend_listen", text(backend_listen.to_string())),
            ("data_dir", text(data_dir.display().to_string())),
            ("cache_dir", text(cache_dir.display().to_string())),
            ("debuginfod_urls", Some(debuginfod_urls.into())),
            ("unwind", text(unwind_name(*unwind).to_owned())),
            ("stack_depth", Some(i64::from(*stack_depth).into())),
            ("target", Some(targets.list().iter().map(target).collect::<Vec<_>>().into())),
            ("target_default", Some(targets.is_default_wanted().into())),
            ("upload", Some(uploads.into())),
            ("node", text(node.clone())),
            ("labels", Some(labels.into())),
            ("heap", Some(heap.list.iter().map(heap_rule).collect::<Vec<_>>().into())),
            ("heap_budget", text(heap.budget.to_string())),
            ("log", text(log.clone())),
            ("log_format", text(log_format_name(*log_format).to_owned())),
            ("profiles", Some(profiles.clone().into())),
            ("enabled", Some((*enabled).into())),
            ("metrics_listen", metrics_listen.map(|address| address.to_string().into())),
            ("token_file", token.as_ref().map(|token| token.file.display().to_string().into())),
            ("run_dir", text(run_dir.display().to_string())),
            ("instance", instance.clone().map(Into::into)),
            ("allow_kernel", Some((*allow_kernel).into())),
        ]
    }
}

fn heap_rule(rule: &Rule) -> toml::Value {
    let Rule { name, value, rate, budget } = rule;
    let keys = [
        ("match", Some(format!("{name}={value}"))),
        ("rate", Some(rate.to_string())),
        ("budget", budget.map(|budget| budget.to_string())),
    ];
    let given = keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.into())));
    toml::Value::Table(given.collect())
}

fn target(target: &Target) -> toml::Value {
    let Target { pid, comm, cgroup, frequency_hz, is_wanted } = target;
    let fields: [(&str, Option<toml::Value>); 5] = [
        ("pid", pid.map(|pid| i64::from(pid).into())),
        ("comm", comm.as_ref().map(|comm| comm.as_str().into())),
        ("cgroup", cgroup.as_ref().map(|path| path.display().to_string().into())),
        ("frequency", frequency_hz.map(|hz| i64::from(hz).into())),
        ("enabled", Some((*is_wanted).into())),
    ];
    let given = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    toml::Value::Table(given.collect())
}

fn duration(duration: Duration) -> String {
    match duration.subsec_millis() {
        0 => format!("{}s", duration.as_secs()),
        _ => format!("{}ms", duration.as_millis()),
    }
}

fn unwind_name(unwind: Unwind) -> &'static str {
    match unwind {
        Unwind::Dwarf => "dwarf",
        Unwind::FramePointers => "frame-pointers",
    }
}

fn log_format_name(format: LogFormat) -> &'static str {
    match format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    }
}

impl Sources {
    /// A TOML file with every key. Comments say where the values come from: flag, environment, file, default.
    pub(crate) fn show(&self, config: &Config) -> Result<String, ConfigError> {
        let (_, in_file) = self.read_file()?;
        let mut text = String::new();
        for (key, value) in config.values() {
            let origins = self.origins(key, &in_file).join(" and ");
            let line = match value {
                Some(value) => writeln!(text, "{key} = {value}  # {origins}"),
                None => writeln!(text, "# {key} is not set"),
            };
            line.expect("a String takes every write");
        }
        Ok(text)
    }

    /// More than one for labels, targets and rules of heaps only, which are merged.
    fn origins(&self, key: Key, in_file: &BTreeSet<String>) -> Vec<&'static str> {
        let file = in_file.contains(key).then_some(Origin::File);
        let given = flags(&key).iter().find_map(|flag| self.given.get(*flag).copied());
        let origins: Vec<_> = match (given, file) {
            (Some(given), file) if matches!(key, "labels" | "target" | "heap") => {
                [Some(given), file].into_iter().flatten().collect()
            }
            (given, file) => vec![given.or(file).unwrap_or(Origin::Default)],
        };
        origins.into_iter().map(Origin::name).collect()
    }
}

/// The flags that say the same as a key of the file.
fn flags(key: &Key) -> &[Key] {
    match *key {
        "labels" => &["label"],
        "target" => &["pid", "comm", "cgroup"],
        _ => std::slice::from_ref(key),
    }
}

impl Origin {
    fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::File => "file",
            Self::Default => "default",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::config::tests::sources;

    /// What is printed for these flags and this file.
    fn shown(args: &[&str], file: &str) -> String {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("agent.toml");
        fs::write(&path, file).expect("write the file");
        let path = path.to_str().expect("a plain path");
        let sources = sources(&[&["--config", path], args].concat());
        let config = sources.load().expect("valid");
        sources.show(&config).expect("it was read before")
    }

    #[track_caller]
    fn check(args: &[&str], file: &str, line: &str) {
        let shown = shown(args, file);
        assert!(shown.lines().any(|found| found == line), "{line:?} in\n{shown}");
    }

    #[test]
    fn each_value_says_where_it_comes_from() {
        check(&["-F", "99"], "frequency = 49\n", "frequency = 99  # flag");
        check(&[], "frequency = 49\n", "frequency = 49  # file");
        check(&[], "", "frequency = 19  # default");
        check(
            &["--label", "a=b"],
            "[labels]\nc = \"d\"\n",
            "labels = { a = \"b\", c = \"d\" }  # flag and file",
        );
        check(&[], "", "# instance is not set");
        check(&["--pid", "7"], "", "target_default = false  # default");
        let shown = shown(&["--pid", "7"], "");
        assert!(
            shown.lines().any(|line| line.starts_with("target = ") && line.ends_with("  # flag")),
            "{shown}"
        );
    }

    #[test]
    fn what_is_printed_is_a_file_that_gives_the_same_configuration() {
        let args = [
            "-F",
            "7",
            "--window",
            "1500ms",
            "--label",
            "team=\"x\"",
            "--instance",
            "a",
            "--heap",
            "exe=x@64KiB@5%",
            "--heap-budget",
            "2%",
        ];
        let text = shown(&args, "enabled = false\nmetrics_listen = \"0.0.0.0:9\"\n");
        let again = shown(&[], &text);
        let values = |text: &str| toml::from_str::<toml::Table>(text).expect("TOML");
        assert_eq!(values(&again), values(&text), "{text}");
    }

    #[test]
    fn secrets_are_not_printed() {
        let shown = shown(&["--upload", "https://user:secret@h/?token=secret"], "");
        assert!(shown.contains("upload = [\"https://h/\"]") && !shown.contains("secret"), "{shown}");
    }
}
