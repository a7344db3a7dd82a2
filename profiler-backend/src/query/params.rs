//! Parameters of a query, as a URL carries them.

use std::{collections::HashMap, ops::Range};

use crate::{
    selector::Selector,
    time::{self, parse_duration_ms, parse_time},
};

/// Nodes of a merged tree unless asked otherwise.
const NODES_DEFAULT: usize = 16_384;
/// Most nodes one may ask for: about 40 MB of JSON.
const NODES_MAX: usize = 1 << 20;
/// Label values unless asked otherwise, and at most.
const VALUES_DEFAULT: usize = 1_000;
const VALUES_MAX: usize = 10_000;
/// Most steps of a series.
const STEPS_MAX: i64 = 11_000;
const DAY_MS: i64 = 86_400_000;
/// Steps that are chosen from when none is asked for: the smallest that gives at most `STEPS_AIM` of them.
const STEPS_NICE_MS: [i64; 12] = [
    10_000, 15_000, 30_000, 60_000, 120_000, 300_000, 600_000, 1_800_000, 3_600_000, 10_800_000, 21_600_000,
    DAY_MS,
];
const STEPS_AIM: i64 = 360;

/// A parameter that was not understood.
#[derive(Debug, thiserror::Error)]
#[error("parameter {name}: {value:?} is not accepted: {accepted}")]
pub(crate) struct ParamError {
    name: &'static str,
    value: String,
    accepted: String,
}

impl ParamError {
    pub(crate) fn new(name: &'static str, value: &str, accepted: impl Into<String>) -> Self {
        let mut value = value.to_owned();
        value.truncate(value.floor_char_boundary(200));
        Self { name, value, accepted: accepted.into() }
    }
}

/// What `merge` answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MergeFormat {
    Json,
    Pprof,
}

/// Buckets of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Steps {
    /// Start of the first one, in Unix milliseconds: a multiple of `step_ms`.
    pub(crate) start_ms: i64,
    pub(crate) step_ms: i64,
    pub(crate) count: usize,
}

/// The parameters of one request, at one time.
#[derive(Debug)]
pub(crate) struct Params {
    values: HashMap<String, String>,
    now_ms: i64,
}

impl Params {
    pub(crate) fn new(values: HashMap<String, String>, now_ms: i64) -> Self {
        Self { values, now_ms }
    }

    /// The value of a parameter; an empty one counts as absent.
    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// `from`, included, to `to`, excluded, in Unix milliseconds.
    pub(crate) fn range_ms(&self) -> Result<Range<i64>, ParamError> {
        let point = |name, default| {
            let text = self.get(name).unwrap_or(default);
            parse_time(text, self.now_ms).ok_or_else(|| ParamError::new(name, text, time::ACCEPTED))
        };
        let (from, to) = (point("from", "now-1h")?, point("to", "now")?);
        match from < to {
            true => Ok(from..to),
            false => {
                Err(ParamError::new("from", self.get("from").unwrap_or("now-1h"), "it must lie before to"))
            }
        }
    }

    pub(crate) fn profile_type(&self) -> &str {
        self.get("type").unwrap_or("cpu")
    }

    /// The type, where all types are meant if none is given.
    pub(crate) fn profile_type_if_given(&self) -> Option<&str> {
        self.get("type")
    }

    pub(crate) fn sample_type(&self) -> Option<&str> {
        self.get("sample_type")
    }

    pub(crate) fn selector(&self) -> Result<Selector, ParamError> {
        let text = self.get("query").unwrap_or("");
        Selector::parse(text).map_err(|error| ParamError::new("query", text, error.to_string()))
    }

    pub(crate) fn group_by(&self) -> Option<&str> {
        self.get("group_by")
    }

    pub(crate) fn format(&self) -> Result<MergeFormat, ParamError> {
        match self.get("format").unwrap_or("json") {
            "json" => Ok(MergeFormat::Json),
            "pprof" => Ok(MergeFormat::Pprof),
            other => Err(ParamError::new("format", other, "json or pprof")),
        }
    }

    pub(crate) fn nodes_max(&self) -> Result<usize, ParamError> {
        self.number("max_nodes", NODES_DEFAULT, NODES_MAX)
    }

    pub(crate) fn values_max(&self) -> Result<usize, ParamError> {
        self.number("limit", VALUES_DEFAULT, VALUES_MAX)
    }

    fn number(&self, name: &'static str, default: usize, max: usize) -> Result<usize, ParamError> {
        let Some(text) = self.get(name) else { return Ok(default) };
        let number = text.parse().ok().filter(|number| (1..=max).contains(number));
        number.ok_or_else(|| ParamError::new(name, text, format!("a number from 1 to {max}")))
    }

    /// The buckets over `range_ms`, on multiples of the step since 1970.
    pub(crate) fn steps(&self, range_ms: &Range<i64>) -> Result<Steps, ParamError> {
        let length_ms = range_ms.end - range_ms.start;
        let step_ms = match self.get("step") {
            Some(text) => parse_duration_ms(text).filter(|&step| step > 0).ok_or_else(|| {
                ParamError::new("step", text, "a duration such as 10s, 1m or 1h30m, more than 0")
            })?,
            None => {
                let enough = STEPS_NICE_MS.into_iter().find(|step| length_ms / step <= STEPS_AIM);
                enough.unwrap_or_else(|| (length_ms / STEPS_AIM / DAY_MS + 1) * DAY_MS)
            }
        };
        let start_ms = range_ms.start - range_ms.start.rem_euclid(step_ms);
        let count = (range_ms.end - start_ms - 1) / step_ms + 1;
        match usize::try_from(count).ok().filter(|_| count <= STEPS_MAX) {
            Some(count) => Ok(Steps { start_ms, step_ms, count }),
            None => {
                let message = format!("{count} steps in this time range, more than {STEPS_MAX}");
                Err(ParamError::new("step", self.get("step").unwrap_or(""), message))
            }
        }
    }
}

impl Steps {
    /// The bucket of a time; `None` outside of all.
    pub(crate) fn index(&self, unix_us: i64) -> Option<usize> {
        let offset_ms = unix_us.div_euclid(1000) - self.start_ms;
        usize::try_from(offset_ms.div_euclid(self.step_ms)).ok().filter(|&index| index < self.count)
    }

    /// The first microsecond behind a bucket.
    pub(crate) fn end_us(&self, index: usize) -> i64 {
        (self.start_ms + self.step_ms * (index as i64 + 1)) * 1000
    }

    /// These buckets, and as many more as reach `end_us`, within the bound on buckets.
    pub(crate) fn reaching(self, end_us: i64) -> Self {
        let length_ms = end_us.div_euclid(1000) + 1 - self.start_ms;
        let wanted = ((length_ms - 1).div_euclid(self.step_ms) + 1).min(STEPS_MAX);
        let count = usize::try_from(wanted).map_or(self.count, |wanted| wanted.max(self.count));
        Self { count, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_795_255_200_000;

    fn params(pairs: &[(&str, &str)]) -> Params {
        let owned = pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        Params::new(owned.collect(), NOW_MS)
    }

    #[track_caller]
    fn check_error<T: std::fmt::Debug>(result: Result<T, ParamError>, message: &str) {
        assert_eq!(result.expect_err("must be refused").to_string(), message);
    }

    #[test]
    fn the_range_defaults_to_the_last_hour() {
        assert_eq!(params(&[]).range_ms().expect("valid"), NOW_MS - 3_600_000..NOW_MS);
        let range = params(&[("from", "now-5m"), ("to", "now-1m")]).range_ms().expect("valid");
        assert_eq!(range, NOW_MS - 300_000..NOW_MS - 60_000);
    }

    #[test]
    fn errors_name_parameter_value_and_what_is_accepted() {
        check_error(
            params(&[("from", "soon")]).range_ms(),
            "parameter from: \"soon\" is not accepted: RFC 3339, Unix milliseconds, now or now-1h30m (units ms, s, m, h, d, w)",
        );
        check_error(
            params(&[("to", "now-2h")]).range_ms(),
            "parameter from: \"now-1h\" is not accepted: it must lie before to",
        );
        check_error(
            params(&[("max_nodes", "0")]).nodes_max(),
            "parameter max_nodes: \"0\" is not accepted: a number from 1 to 1048576",
        );
        check_error(
            params(&[("format", "svg")]).format(),
            "parameter format: \"svg\" is not accepted: json or pprof",
        );
        check_error(
            params(&[("query", "{a}")]).selector(),
            "parameter query: \"{a}\" is not accepted: at 2: expected =, !=, =~ or !~, found '}'",
        );
    }

    #[test]
    fn steps_lie_on_the_grid_and_cover_the_range() {
        let steps = params(&[("step", "10s")]).steps(&(NOW_MS + 3_000..NOW_MS + 21_000)).expect("valid");
        assert_eq!(steps, Steps { start_ms: NOW_MS, step_ms: 10_000, count: 3 });
        assert_eq!(steps.index((NOW_MS + 20_999) * 1000), Some(2));
        assert_eq!(steps.index((NOW_MS + 30_000) * 1000), None);
        assert_eq!(steps.index((NOW_MS - 1) * 1000), None);
        let exact = params(&[("step", "10s")]).steps(&(NOW_MS..NOW_MS + 20_000)).expect("valid");
        assert_eq!(exact.count, 2);
    }

    #[test]
    fn a_step_is_chosen_when_none_is_given_and_too_many_are_refused() {
        let day = NOW_MS - 86_400_000..NOW_MS;
        assert_eq!(params(&[]).steps(&day).expect("valid").step_ms, 300_000);
        check_error(
            params(&[("step", "1s")]).steps(&day),
            "parameter step: \"1s\" is not accepted: 86400 steps in this time range, more than 11000",
        );
        assert!(params(&[("step", "0s")]).steps(&day).is_err());
        assert!(params(&[]).steps(&(0..253_402_300_799_999)).is_ok());
    }
}
