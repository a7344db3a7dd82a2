//! Whose heap is profiled, and at what rate.

use super::member;
use crate::label::SeriesLabels;

/// Mean bytes between samples, as in Go's runtime.
pub(crate) const DEFAULT_RATE: u32 = 512 << 10;

/// Processes of one kind, and their rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Name of a series label, or `pid`, `family` (a pid), `cgroup`.
    pub(crate) name: String,
    /// Its whole value.
    pub(crate) value: String,
    /// Mean bytes between samples; 0 is off.
    pub(crate) rate: u32,
}

impl Rule {
    /// Whether a process is meant.
    pub(crate) fn matches(&self, pid: u32, labels: &SeriesLabels) -> bool {
        match self.name.as_str() {
            "pid" => self.value == pid.to_string(),
            "family" => {
                let ancestor = self.value.parse();
                ancestor.is_ok_and(|ancestor| member::is_of_family("/proc".as_ref(), pid, ancestor))
            }
            "cgroup" => member::is_in_cgroup("/proc".as_ref(), pid, &self.value),
            name => labels.get(name) == Some(&self.value),
        }
    }
}

/// The rate of the first rule that means a process; `None` where none does or it says off.
pub(crate) fn rate_of(rules: &[Rule], pid: u32, labels: &SeriesLabels) -> Option<u32> {
    let rule = rules.iter().find(|rule| rule.matches(pid, labels))?;
    (rule.rate != 0).then_some(rule.rate)
}

/// `NAME=VALUE` or `NAME=VALUE@RATE`.
pub(crate) fn parse(text: &str) -> Option<Rule> {
    let (matched, rate) = match text.rsplit_once('@') {
        Some((matched, rate)) => (matched, parse_rate(rate)?),
        None => (text, DEFAULT_RATE),
    };
    let (name, value) = matched.split_once('=')?;
    let is_name = profiler_pprof::push::is_label_name(name) && !value.is_empty();
    is_name.then(|| Rule { name: name.to_owned(), value: value.to_owned(), rate })
}

/// Bytes, with `KiB`, `MiB` or `B` behind them or nothing; below 4 GiB.
pub(crate) fn parse_rate(text: &str) -> Option<u32> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u32 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return None,
    };
    number.parse::<u32>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label::{Labeler, Subject};

    #[track_caller]
    fn check(text: &str, expect: Option<(&str, &str, u32)>) {
        let rule = expect.map(|(name, value, rate)| Rule { name: name.into(), value: value.into(), rate });
        assert_eq!(parse(text), rule, "{text}");
    }

    #[test]
    fn rules_are_a_label_and_perhaps_a_rate() {
        check("exe=postgres", Some(("exe", "postgres", 512 << 10)));
        check("pid=71@1", Some(("pid", "71", 1)));
        check("container=a@b@64KiB", Some(("container", "a@b", 64 << 10)));
        check("unit=x@0", Some(("unit", "x", 0)));
        check("exe=x@2MiB", Some(("exe", "x", 2 << 20)));
        for wrong in ["", "exe", "exe=", "=x", "exe=x@", "exe=x@1KB", "exe=x@5000000KiB", "a-b=c"] {
            check(wrong, None);
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let labels = Labeler::new("n", &[]).series(&Subject { exe: "/usr/bin/x", ..Subject::default() });
        let rules = |texts: &[&str]| -> Vec<Rule> { texts.iter().filter_map(|text| parse(text)).collect() };
        assert_eq!(rate_of(&rules(&["pid=7@0", "exe=x@8"]), 7, &labels), None);
        assert_eq!(rate_of(&rules(&["pid=7@0", "exe=x@8"]), 8, &labels), Some(8));
        assert_eq!(rate_of(&rules(&["exe=y"]), 8, &labels), None);
        assert_eq!(rate_of(&rules(&["node=n@9"]), 8, &labels), Some(9));
    }
}
