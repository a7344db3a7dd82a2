//! Whose heap is profiled, and at what rate.

use super::{Budget, member};
use crate::label::SeriesLabels;

/// Mean bytes between samples, as in Go's runtime.
pub(crate) const DEFAULT_RATE: u32 = 512 << 10;

/// What a rule of a process with all that it starts is named.
const FAMILY: &str = "family";

/// Processes of one kind, and how they are profiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Name of a series label, or `pid`, `family` (a pid), `cgroup`.
    pub(crate) name: String,
    /// Its whole value.
    pub(crate) value: String,
    /// Mean bytes between samples; 0 is off.
    pub(crate) rate: u32,
    /// What their probes may take, where that is not the same as for all.
    pub(crate) budget: Option<Budget>,
}

/// Whom to profile, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    /// The first that means a process decides.
    pub(crate) list: Vec<Rule>,
    /// What the probes of a process may take, where its rule does not say.
    pub(crate) budget: Budget,
}

/// How one process is profiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Mean bytes between samples, not 0.
    pub(super) rate: u32,
    pub(super) budget: Budget,
}

impl Rules {
    /// By the first rule that means a process; `None` where none does or it says off. `is_followed` is whether it is of a
    /// family that the kernel side follows, which is the rules' family.
    pub(super) fn of(
        &self,
        pid: u32,
        labels: &SeriesLabels,
        is_followed: impl Fn() -> bool,
    ) -> Option<Setting> {
        let is_meant = |rule: &&Rule| rule.matches(pid, labels) || rule.name == FAMILY && is_followed();
        let &Rule { rate, budget, .. } = self.list.iter().find(is_meant)?;
        (rate != 0).then(|| Setting { rate, budget: budget.unwrap_or(self.budget) })
    }

    /// Whether children of anybody may be meant.
    pub(super) fn have_families(&self) -> bool {
        self.list.iter().any(|rule| rule.name == FAMILY)
    }

    /// The rate that profiles state: the lowest, for every sample has its own.
    pub(super) fn stated_rate(&self) -> u32 {
        self.list.iter().map(|rule| rule.rate).filter(|&rate| rate > 0).min().unwrap_or(0)
    }
}

impl Rule {
    /// Whether a process is meant.
    pub(crate) fn matches(&self, pid: u32, labels: &SeriesLabels) -> bool {
        match self.name.as_str() {
            "pid" => self.value == pid.to_string(),
            FAMILY => {
                let ancestor = self.value.parse();
                ancestor.is_ok_and(|ancestor| member::is_of_family("/proc".as_ref(), pid, ancestor))
            }
            "cgroup" => member::is_in_cgroup("/proc".as_ref(), pid, &self.value),
            name => labels.get(name) == Some(&self.value),
        }
    }
}

/// `NAME=VALUE`, `NAME=VALUE@RATE` or `NAME=VALUE@RATE@BUDGET`.
pub(crate) fn parse(text: &str) -> Option<Rule> {
    let (text, budget) = match text.rsplit_once('@') {
        Some((rest, budget)) if budget == "off" || budget.ends_with('%') => {
            (rest, Some(budget.parse().ok()?))
        }
        _ => (text, None),
    };
    let (matched, rate) = match text.rsplit_once('@') {
        Some((matched, rate)) => (matched, parse_rate(rate)?),
        None => (text, DEFAULT_RATE),
    };
    let (name, value) = matched.split_once('=')?;
    let is_name = profiler_pprof::push::is_label_name(name) && !value.is_empty();
    is_name.then(|| Rule { name: name.to_owned(), value: value.to_owned(), rate, budget })
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
        let rule = expect.map(|(name, value, rate)| Rule {
            name: name.into(),
            value: value.into(),
            rate,
            budget: None,
        });
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
    fn a_rule_may_have_a_budget_of_its_own() {
        for (text, rate, budget) in [
            ("exe=x@64KiB@5%", 64 << 10, "5%"),
            ("exe=x@0.5%", DEFAULT_RATE, "0.5%"),
            ("exe=x@1@off", 1, "off"),
        ] {
            let rule = parse(text).expect(text);
            assert_eq!((rule.value.as_str(), rule.rate), ("x", rate), "{text}");
            assert_eq!(rule.budget, budget.parse().ok(), "{text}");
        }
        for wrong in ["exe=x@0%", "exe=x@1@x%"] {
            check(wrong, None);
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let labels = Labeler::new("n", &[]).series(&Subject { exe: "/usr/bin/x", ..Subject::default() });
        let of = |texts: &[&str], pid| {
            let list = texts.iter().filter_map(|text| parse(text)).collect();
            Rules { list, budget: Budget::DEFAULT }.of(pid, &labels, || pid == 9)
        };
        let setting = |rate, budget| Some(Setting { rate, budget });
        assert_eq!(of(&["pid=7@0", "exe=x@8"], 7), None);
        assert_eq!(of(&["pid=7@0", "exe=x@8"], 8), setting(8, Budget::DEFAULT));
        assert_eq!(of(&["exe=y"], 8), None);
        assert_eq!(of(&["node=n@9@off"], 8), setting(9, Budget::Off));
        // Above the largest pid: nobody is below it but by what the kernel side says.
        assert_eq!([8, 9].map(|pid| of(&["family=5000000@7"], pid)), [None, setting(7, Budget::DEFAULT)]);
    }
}
