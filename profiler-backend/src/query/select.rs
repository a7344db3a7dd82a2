//! Which profiles and samples a query means, and what there is to choose from.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    ops::Range,
    sync::Arc,
};

use profiler_pprof::push::Temporality;
use serde::Serialize;

use super::{
    QueryError,
    params::{ParamError, Params},
};
use crate::{
    model::{ContentId, ProfileHead, Series, ValueType},
    selector::{Matcher, Selector},
    store::{LabelNeed, Row, Scan, Snapshot},
};

/// Label that parts are clustered by.
const CLUSTER_LABEL: &str = "container";
/// Comments kept of all selected profiles.
const COMMENTS_MAX: usize = 64;

/// The profiles that a selector and a time range mean.
#[derive(Default)]
pub(crate) struct Selection {
    pub(crate) range_us: Range<i64>,
    pub(crate) series: Vec<SelectedSeries>,
    /// The newest one: it decides what sample types there are.
    pub(crate) newest: Option<ProfileHead>,
    /// Profiles that count: for snapshots one per series.
    pub(crate) profiles: usize,
    /// Distinct comments, in order of first appearance, at most [`COMMENTS_MAX`].
    comments: Vec<Arc<str>>,
    numbers: HashMap<ContentId, Option<u32>>,
    windows: Vec<Range<i64>>,
}

/// A series of a selection.
pub(crate) struct SelectedSeries {
    pub(crate) series: Arc<Series>,
    /// Matchers on labels that the series does not have: samples decide.
    matchers: Vec<Matcher>,
    /// Start of its newest profile.
    newest_us: i64,
}

impl Selection {
    /// Selects profiles of `profile_type`, or of all types.
    pub(crate) fn new(
        snapshot: &Snapshot,
        range_us: Range<i64>,
        selector: &Selector,
        profile_type: Option<&str>,
    ) -> Self {
        let mut selection = Self { range_us: range_us.clone(), ..Self::default() };
        snapshot.profiles(&range_us, profile_type, |profile| selection.add(selector, profile));
        selection.finish();
        selection
    }

    /// As [`Selection::new`], from the parameters `query`, `from`, `to` and `type`.
    pub(crate) fn from_params(snapshot: &Snapshot, params: &Params) -> Result<Self, QueryError> {
        let range_us = range_us(&params.range_ms()?);
        Ok(Self::new(snapshot, range_us, &params.selector()?, Some(params.profile_type())))
    }

    fn add(&mut self, selector: &Selector, profile: &ProfileHead) {
        let next = self.series.len() as u32;
        let number = *self.numbers.entry(profile.series.id).or_insert_with(|| {
            let matchers = remaining(selector, &profile.series)?;
            let series = Arc::clone(&profile.series);
            self.series.push(SelectedSeries { series, matchers, newest_us: i64::MIN });
            Some(next)
        });
        let Some(series) = number.and_then(|number| self.series.get_mut(number as usize)) else { return };
        series.newest_us = series.newest_us.max(profile.start_us);
        self.profiles += 1;
        self.windows.push(profile.start_us..profile.start_us + profile.duration_ns / 1000);
        for comment in profile.comments.iter() {
            if self.comments.len() < COMMENTS_MAX && !self.comments.contains(comment) {
                self.comments.push(Arc::clone(comment));
            }
        }
        if self.newest.as_ref().is_none_or(|newest| newest.start_us <= profile.start_us) {
            self.newest = Some(profile.clone());
        }
    }

    fn finish(&mut self) {
        if self.temporality() == Temporality::Snapshot {
            self.profiles = self.series.len();
        }
        self.windows.sort_by_key(|window| window.start);
    }

    /// The comments, and one of our own when a scan of `snapshot` met parts that cannot be read.
    pub(crate) fn comments(&self, snapshot: &Snapshot) -> Vec<Arc<str>> {
        let mut comments = self.comments.clone();
        let unreadable = snapshot.unreadable_parts(&self.range_us);
        if unreadable > 0 {
            comments.push(format!("incomplete: {unreadable} stored parts cannot be read").into());
        }
        comments
    }

    /// Delta when nothing is selected.
    pub(crate) fn temporality(&self) -> Temporality {
        self.newest.as_ref().map_or(Temporality::Delta, |newest| newest.series.temporality)
    }

    /// Time covered by at least one profile, in microseconds: windows of several series overlap.
    pub(crate) fn covered_us(&self) -> i64 {
        let mut covered = 0;
        let mut end = i64::MIN;
        for window in &self.windows {
            covered += (window.end - window.start.max(end)).max(0);
            end = end.max(window.end);
        }
        covered
    }

    /// Start of the first and end of the last profile, in microseconds.
    pub(crate) fn span_us(&self) -> Option<Range<i64>> {
        let start = self.windows.first()?.start;
        let end = self.windows.iter().map(|window| window.end).max()?;
        Some(start..end)
    }

    /// The sample type that is asked for by name, or the default one; `None` when nothing is selected.
    pub(crate) fn value_type(&self, name: Option<&str>) -> Result<Option<ValueType>, ParamError> {
        let Some(newest) = &self.newest else { return Ok(None) };
        let Some(name) = name else {
            return Ok(newest.sample_types.get(newest.default_sample_type).cloned());
        };
        let found = newest.sample_types.iter().find(|value_type| &*value_type.name == name);
        let known = || newest.sample_types.iter().map(|t| &*t.name).collect::<Vec<_>>().join(", ");
        found
            .cloned()
            .map(Some)
            .ok_or_else(|| ParamError::new("sample_type", name, format!("one of {}", known())))
    }

    /// The scan over the samples of this selection; `also` names labels that the caller reads.
    pub(crate) fn scan(&self, also: Labels<'_>) -> Scan {
        let numbers = self.numbers.iter().filter_map(|(id, number)| Some((*id, (*number)?)));
        let clusters =
            self.series.iter().map(|s| s.series.labels.get(CLUSTER_LABEL).unwrap_or("").to_owned());
        let matched = self.series.iter().flat_map(|series| &series.matchers).map(|m| m.name.clone());
        let labels = match also {
            Labels::All => LabelNeed::All,
            Labels::One(name) => LabelNeed::Named(matched.chain(name.map(str::to_owned)).collect()),
        };
        Scan {
            range_us: self.range_us.clone(),
            series: numbers.collect(),
            clusters: clusters.collect(),
            labels,
        }
    }

    /// Whether a row of that scan is meant: its labels match, and a snapshot is the newest of its series.
    pub(crate) fn accepts(&self, row: &Row<'_>) -> bool {
        let Some(SelectedSeries { series, matchers, newest_us }) = self.series.get(row.series as usize)
        else {
            return false;
        };
        let current = series.temporality == Temporality::Delta || row.start_us == *newest_us;
        current && self.matches(matchers, row)
    }

    /// As [`Selection::accepts`], for any snapshot of the series.
    pub(crate) fn accepts_any_time(&self, row: &Row<'_>) -> bool {
        let series = self.series.get(row.series as usize);
        series.is_some_and(|series| self.matches(&series.matchers, row))
    }

    fn matches(&self, matchers: &[Matcher], row: &Row<'_>) -> bool {
        matchers.iter().all(|matcher| matcher.accepts(row.labels.get(&matcher.name).as_deref().unwrap_or("")))
    }

    /// The value of a label for a row: of its series, else of its sample, else `""`.
    pub(crate) fn label<'a>(&'a self, row: &'a Row<'_>, name: &str) -> std::borrow::Cow<'a, str> {
        let series = self.series.get(row.series as usize).and_then(|s| s.series.labels.get(name));
        series.map(Into::into).or_else(|| row.labels.get(name)).unwrap_or_default()
    }
}

/// Labels a caller reads from each row.
pub(crate) enum Labels<'a> {
    All,
    One(Option<&'a str>),
}

pub(crate) fn range_us(range_ms: &Range<i64>) -> Range<i64> {
    range_ms.start * 1000..range_ms.end * 1000
}

/// The matchers that samples must decide; `None` when the series itself does not match.
fn remaining(selector: &Selector, series: &Series) -> Option<Vec<Matcher>> {
    let mut remaining = Vec::new();
    for matcher in &selector.matchers {
        match series.labels.get(&matcher.name) {
            Some(value) if matcher.accepts(value) => {}
            Some(_) => return None,
            None => remaining.push(matcher.clone()),
        }
    }
    Some(remaining)
}

/// Answer of `types`.
#[derive(Debug, Serialize)]
pub(crate) struct ProfileTypes {
    types: Vec<ProfileType>,
}

#[derive(Debug, Serialize)]
struct ProfileType {
    r#type: Arc<str>,
    temporality: &'static str,
    sample_types: Vec<SampleType>,
    default_sample_type: Arc<str>,
}

#[derive(Debug, Serialize)]
struct SampleType {
    r#type: Arc<str>,
    unit: Arc<str>,
}

/// The profile types in a range, each as its newest profile says.
pub(crate) fn profile_types(snapshot: &Snapshot, params: &Params) -> Result<ProfileTypes, QueryError> {
    let selector = params.selector()?;
    let mut newest: BTreeMap<Arc<str>, ProfileHead> = BTreeMap::new();
    let range = range_us(&params.range_ms()?);
    snapshot.profiles(&range, params.profile_type_if_given(), |profile| {
        if remaining(&selector, &profile.series).is_none() {
            return;
        }
        match newest.entry(Arc::clone(&profile.series.profile_type)) {
            Entry::Vacant(entry) => drop(entry.insert(profile.clone())),
            Entry::Occupied(mut entry) if entry.get().start_us < profile.start_us => {
                entry.insert(profile.clone());
            }
            Entry::Occupied(_) => {}
        }
    });
    let types = newest.into_iter().map(|(name, profile)| ProfileType {
        r#type: name,
        temporality: profile.series.temporality.name(),
        default_sample_type: match profile.sample_types.get(profile.default_sample_type) {
            Some(value_type) => Arc::clone(&value_type.name),
            None => "".into(),
        },
        sample_types: profile
            .sample_types
            .iter()
            .map(|t| SampleType { r#type: Arc::clone(&t.name), unit: Arc::clone(&t.unit) })
            .collect(),
    });
    Ok(ProfileTypes { types: types.collect() })
}

/// Answer of `labels`.
#[derive(Debug, Serialize)]
pub(crate) struct LabelNames {
    labels: BTreeSet<Arc<str>>,
}

/// Names of series and sample labels in a range; of all types when none is given.
pub(crate) fn label_names(snapshot: &Snapshot, params: &Params) -> Result<LabelNames, QueryError> {
    let selector = params.selector()?;
    let mut labels: BTreeSet<Arc<str>> = BTreeSet::new();
    let range = range_us(&params.range_ms()?);
    snapshot.profiles(&range, params.profile_type_if_given(), |profile| {
        if remaining(&selector, &profile.series).is_some() {
            let series = profile.series.labels.names();
            labels.extend(series.chain(profile.label_names.iter()).cloned());
        }
    });
    Ok(LabelNames { labels })
}

/// Answer of `labels/{name}/values`.
#[derive(Debug, Serialize)]
pub(crate) struct LabelValues {
    values: BTreeSet<String>,
    truncated: bool,
}

/// Values of one label in a range; of all types when none is given.
pub(crate) fn label_values(
    snapshot: &Snapshot,
    params: &Params,
    name: &str,
) -> Result<LabelValues, QueryError> {
    let max = params.values_max()?;
    let selector = params.selector()?;
    let range = range_us(&params.range_ms()?);
    let selection = Selection::new(snapshot, range, &selector, params.profile_type_if_given());
    let mut found = LabelValues { values: BTreeSet::new(), truncated: false };
    // Samples tell for series that lack the label, and where a matcher on samples decides which series has any.
    let mut scan = selection.scan(Labels::One(Some(name)));
    for selected in &selection.series {
        let value = selected.series.labels.get(name);
        if let (Some(value), true) = (value, selected.matchers.is_empty()) {
            found.add(value, max);
            scan.series.remove(&selected.series.id);
        }
    }
    snapshot.samples(&scan, |row| {
        if selection.accepts_any_time(row) {
            found.add(&selection.label(row, name), max);
        }
    });
    Ok(found)
}

impl LabelValues {
    fn add(&mut self, value: &str, max: usize) {
        if value.is_empty() || self.values.contains(value) {
            return;
        }
        match self.values.len() < max {
            true => drop(self.values.insert(value.to_owned())),
            false => self.truncated = true,
        }
    }
}
