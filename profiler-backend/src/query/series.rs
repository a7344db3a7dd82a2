//! Totals over time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

use profiler_pprof::push::Temporality;
use serde::Serialize;

use super::{
    QueryError,
    params::{Params, Steps},
    select::{Labels, Selection},
};
use crate::store::{Row, Snapshot};

/// Groups in an answer: the largest ones.
const GROUPS_SHOWN: usize = 100;
/// Most values, of all groups, that are summed before the largest groups are known: 64 MB.
const VALUES_MAX: usize = 4 << 20;
/// Bits behind the point of a value while it is spread, or a value of 1 could only go to one step as a whole.
const FRACTION_BITS: u32 = 20;

/// Answer of `series`.
#[derive(Debug, Serialize)]
pub(crate) struct SeriesAnswer {
    unit: Arc<str>,
    step_ms: i64,
    start_ms: i64,
    series: Vec<Group>,
    /// There are more groups than shown.
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct Group {
    labels: BTreeMap<String, String>,
    /// One per step.
    values: Vec<i64>,
}

/// Totals per step, of everything or per value of a label.
///
/// The profiles are those whose window starts in the range, as for a merge. A window's value is spread over the steps it
/// overlaps, in proportion; where the last one reaches beyond the range, so do the steps. The sum over all steps is the
/// sum of the values.
pub(crate) fn series(snapshot: &Snapshot, params: &Params) -> Result<SeriesAnswer, QueryError> {
    let steps = params.steps(&params.range_ms()?)?;
    let selection = Selection::from_params(snapshot, params)?;
    let value_type = selection.value_type(params.sample_type())?;
    let group_by = params.group_by();
    let steps = selection.span_us().map_or(steps, |span| steps.reaching(span.end));
    let mut totals = Totals { steps, groups: HashMap::new(), newest: HashMap::new() };
    if group_by.is_none() {
        totals.groups.insert(String::new(), vec![0; steps.count]);
    }
    let mut unit = Arc::from("");
    if let Some(value_type) = value_type {
        let wanted = (&*value_type.name, &*value_type.unit);
        totals.add_all(snapshot, &selection, wanted, group_by)?;
        unit = value_type.unit;
    }
    let (series, truncated) = totals.largest(group_by);
    Ok(SeriesAnswer { unit, step_ms: steps.step_ms, start_ms: steps.start_ms, series, truncated })
}

struct Totals {
    steps: Steps,
    /// Values in units of 2^-[`FRACTION_BITS`], one per step.
    groups: HashMap<String, Vec<i128>>,
    /// Snapshots: start of the newest profile by series and step.
    newest: HashMap<(u32, usize), i64>,
}

impl Totals {
    fn add_all(
        &mut self,
        snapshot: &Snapshot,
        selection: &Selection,
        wanted: (&str, &str),
        group_by: Option<&str>,
    ) -> Result<(), QueryError> {
        let scan = selection.scan(Labels::One(group_by));
        let meant =
            |row: &Row<'_>| (row.type_name, row.type_unit) == wanted && selection.accepts_any_time(row);
        let snapshots = selection.temporality() == Temporality::Snapshot;
        if snapshots {
            snapshot.samples(&scan, |row| {
                if let (true, Some(step)) = (meant(row), self.steps.index(row.start_us)) {
                    let newest = self.newest.entry((row.series, step)).or_insert(row.start_us);
                    *newest = row.start_us.max(*newest);
                }
            });
        }
        let mut fits = Ok(());
        snapshot.samples(&scan, |row| {
            let Some(step) = self.steps.index(row.start_us).filter(|_| fits.is_ok() && meant(row)) else {
                return;
            };
            if !snapshots || self.newest.get(&(row.series, step)) == Some(&row.start_us) {
                let group = group_by.map(|name| selection.label(row, name)).unwrap_or_default();
                fits = self.add(&group, step, row);
            }
        });
        fits
    }

    /// `first` is the step in which the row's window starts.
    fn add(&mut self, group: &str, first: usize, row: &Row<'_>) -> Result<(), QueryError> {
        if !self.groups.contains_key(group) {
            let max = VALUES_MAX / self.steps.count;
            if self.groups.len() >= max {
                return Err(QueryError::TooLarge { what: "groups", max });
            }
            self.groups.insert(group.to_owned(), vec![0; self.steps.count]);
        }
        if let Some(totals) = self.groups.get_mut(group) {
            let ends_us = (first..self.steps.count).map(|step| self.steps.end_us(step));
            let window_us = row.start_us..row.start_us + row.duration_ms * 1000;
            spread(totals.iter_mut().skip(first).zip(ends_us), &window_us, row.value);
        }
        Ok(())
    }

    fn largest(self, group_by: Option<&str>) -> (Vec<Group>, bool) {
        let mut groups: Vec<_> = self.groups.into_iter().collect();
        groups.sort_by_cached_key(|(group, totals)| (Reverse(totals.iter().sum::<i128>()), group.clone()));
        let truncated = groups.len() > GROUPS_SHOWN;
        groups.truncate(GROUPS_SHOWN);
        let labels = |value: String| group_by.map(|name| (name.to_owned(), value)).into_iter().collect();
        let groups = groups
            .into_iter()
            .map(|(value, totals)| Group { labels: labels(value), values: whole_values(&totals) });
        (groups.collect(), truncated)
    }
}

/// Adds to each step, given with its end, the share of `value` that falls into it; the last one takes what lies behind.
fn spread<'a>(steps: impl Iterator<Item = (&'a mut i128, i64)>, window_us: &Range<i64>, value: i64) {
    // 83 bits, times the 42 of the longest window.
    let value = i128::from(value) << FRACTION_BITS;
    let length_us = i128::from(window_us.end - window_us.start);
    let mut given = 0;
    let mut steps = steps.peekable();
    while let Some((total, end_us)) = steps.next() {
        let is_last = end_us >= window_us.end || steps.peek().is_none();
        let until_here =
            if is_last { value } else { value * i128::from(end_us - window_us.start) / length_us };
        *total += until_here - given;
        given = until_here;
        if is_last {
            break;
        }
    }
}

/// The totals without their fractions, which go on to the next step: no value is lost.
fn whole_values(totals: &[i128]) -> Vec<i64> {
    let (mut sum, mut given) = (0, 0);
    let mut whole = |total: &i128| {
        sum += total;
        let value = (sum >> FRACTION_BITS) - given;
        given += value;
        i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
    };
    totals.iter().map(&mut whole).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spreads (start, end, value) over steps of 10.
    #[track_caller]
    fn check(windows: &[(i64, i64, i64)], expect: &[i64]) {
        let mut totals = vec![0; expect.len()];
        for &(start, end, value) in windows {
            let first = usize::try_from(start / 10).expect("not negative");
            let ends = (first..expect.len()).map(|step| (step as i64 + 1) * 10);
            spread(totals.iter_mut().skip(first).zip(ends), &(start..end), value);
        }
        assert_eq!(whole_values(&totals), expect, "{windows:?}");
    }

    #[test]
    fn a_value_is_spread_in_proportion() {
        check(&[(0, 10, 7)], &[7, 0]);
        check(&[(5, 15, 100), (15, 25, 100)], &[50, 100, 50]);
        check(&[(8, 28, 100)], &[10, 50, 40]);
        check(&[(8, 28, -100)], &[-10, -50, -40]);
        check(&[(3, 3, 9)], &[9, 0]);
    }

    #[test]
    fn many_small_values_are_spread_as_one_large_one() {
        check(&[(5, 15, 1); 100], &[50, 50]);
    }

    #[test]
    fn no_value_is_lost_to_rounding_or_behind_the_last_step() {
        check(&[(1, 31, 100)], &[30, 33, 33, 4]);
        check(&[(1, 31, 1)], &[0, 0, 0, 1]);
        check(&[(12, 40, 28)], &[0, 8, 20]);
        check(&[(0, 20, i64::MAX), (0, 20, i64::MAX)], &[i64::MAX, i64::MAX]);
    }
}
