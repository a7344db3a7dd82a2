//! All selected samples as one profile for `go tool pprof` and its like.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use profiler_pprof::{
    FunctionSpec, LabelSpec, LabelValue, LineSpec, LocationId, LocationSpec, MappingSpec, ProfileBuilder,
    TypeSpec, encode_gzip,
};

use super::{
    QueryError,
    params::Params,
    select::{Labels, Selection},
};
use crate::{
    flamegraph::unnamed,
    model::{ContentId, ProfileHead, SampleLabels},
    stack::{Frame, FrameParts, Stack},
    store::{Row, Snapshot},
};

/// Most samples of the merged profile: about 500 MB while they are summed.
const SAMPLES_MAX: usize = 2 << 20;

/// The selection as gzipped pprof: sample labels kept, series labels added to each sample, every frame named.
pub(crate) fn pprof(snapshot: &Snapshot, params: &Params) -> Result<Vec<u8>, QueryError> {
    let selection = Selection::from_params(snapshot, params)?;
    let value_type = selection.value_type(params.sample_type())?;
    let mut builder = match (&selection.newest, value_type) {
        (Some(newest), Some(value_type)) => new_builder(newest, &value_type.name),
        _ => empty_builder(params),
    };
    if let Some(span) = selection.span_us() {
        builder.time_ns(span.start.saturating_mul(1000));
        builder.duration_ns(selection.covered_us().saturating_mul(1000));
    }
    let sums = Sums::new(snapshot, &selection)?;
    sums.build(snapshot, &selection, &mut builder);
    selection.comments(snapshot).iter().for_each(|comment| builder.comment(comment));
    Ok(encode_gzip(&builder.finish()))
}

fn new_builder(newest: &ProfileHead, default: &str) -> ProfileBuilder {
    let types: Vec<TypeSpec<'_>> = newest
        .sample_types
        .iter()
        .map(|value_type| TypeSpec::new(&value_type.name, &value_type.unit))
        .collect();
    let period_type = TypeSpec::new(&newest.period_type.name, &newest.period_type.unit);
    let mut builder = ProfileBuilder::new(&types, period_type, newest.period);
    builder.default_sample_type(default);
    builder
}

/// A profile without samples still has a type, or readers refuse it.
fn empty_builder(params: &Params) -> ProfileBuilder {
    let value_type = TypeSpec::new(params.sample_type().unwrap_or("samples"), "count");
    ProfileBuilder::new(&[value_type], value_type, 1)
}

/// Values by series, stack and sample labels.
struct Sums {
    values: HashMap<(u32, ContentId, u32), Box<[i64]>>,
    labels: Vec<Arc<SampleLabels>>,
    label_numbers: HashMap<Arc<SampleLabels>, u32>,
}

impl Sums {
    fn new(snapshot: &Snapshot, selection: &Selection) -> Result<Self, QueryError> {
        let mut sums = Self { values: HashMap::new(), labels: Vec::new(), label_numbers: HashMap::new() };
        let Some(newest) = &selection.newest else { return Ok(sums) };
        let mut fits = Ok(());
        snapshot.samples(&selection.scan(Labels::All), |row| {
            let type_of_row =
                |t: &crate::model::ValueType| (&*t.name, &*t.unit) == (row.type_name, row.type_unit);
            let index = newest.sample_types.iter().position(type_of_row);
            if let (Ok(()), Some(index), true) = (&fits, index, selection.accepts(row)) {
                fits = sums.add(row, index, newest.sample_types.len());
            }
        });
        fits.map(|()| sums)
    }

    fn add(&mut self, row: &Row<'_>, index: usize, types: usize) -> Result<(), QueryError> {
        let labels = self.labels(row.labels.to_labels());
        let known = self.values.len();
        let values = match self.values.entry((row.series, row.stack, labels)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if known >= SAMPLES_MAX => {
                return Err(QueryError::TooLarge { what: "samples", max: SAMPLES_MAX });
            }
            Entry::Vacant(entry) => entry.insert(vec![0; types].into_boxed_slice()),
        };
        if let Some(value) = values.get_mut(index) {
            *value = value.saturating_add(row.value);
        }
        Ok(())
    }

    fn labels(&mut self, labels: SampleLabels) -> u32 {
        if let Some(&number) = self.label_numbers.get(&labels) {
            return number;
        }
        let (labels, number) = (Arc::new(labels), self.labels.len() as u32);
        self.labels.push(Arc::clone(&labels));
        self.label_numbers.insert(labels, number);
        number
    }

    fn build(self, snapshot: &Snapshot, selection: &Selection, builder: &mut ProfileBuilder) {
        let ids = self.values.keys().map(|(_, stack, _)| *stack);
        let stacks = snapshot.stacks(&selection.range_us, ids);
        let mut locations = Locations::new(stacks.values());
        // In the order of content, so that equal data gives equal bytes.
        let mut values: Vec<_> = self.values.into_iter().collect();
        values.sort_unstable_by_key(|((series, stack, labels), _)| {
            let series = selection.series.get(*series as usize).map(|selected| selected.series.id);
            (series, *stack, self.labels.get(*labels as usize))
        });
        for ((series, stack, labels), values) in values {
            let (Some(stack), Some(labels), Some(series)) =
                (stacks.get(&stack), self.labels.get(labels as usize), selection.series.get(series as usize))
            else {
                continue;
            };
            let stack = locations.stack(builder, stack);
            builder.sample(&stack, &values, &label_specs(&series.series.labels, labels));
        }
    }
}

/// Labels of the series, then those of the sample that have another name.
fn label_specs<'a>(series: &'a crate::model::Labels, sample: &'a SampleLabels) -> Vec<LabelSpec<'a>> {
    let texts = sample.texts.iter().filter(|(name, _)| series.get(name).is_none());
    let texts = series.iter().chain(texts).map(|(name, value)| LabelSpec::text(name, value));
    let numbers = sample.numbers.iter().filter(|label| series.get(&label.name).is_none());
    let numbers = numbers
        .map(|label| LabelSpec { key: &label.name, value: LabelValue::Number(label.value, &label.unit) });
    texts.chain(numbers).collect()
}

/// Turns frames back into locations: inlined calls join the one they were inlined into.
struct Locations {
    /// Highest address of each binary: its mapping must reach so far.
    limits: HashMap<(Arc<str>, Arc<str>), u64>,
    known: HashMap<Vec<ContentId>, LocationId>,
}

impl Locations {
    fn new<'a>(stacks: impl Iterator<Item = &'a Arc<Stack>>) -> Self {
        let mut limits: HashMap<(Arc<str>, Arc<str>), u64> = HashMap::new();
        for frame in stacks.flat_map(|stack| &stack.frames) {
            let FrameParts { binary, build_id, address, .. } = &frame.parts;
            let limit = limits.entry((Arc::clone(binary), Arc::clone(build_id))).or_default();
            *limit = (*limit).max(address.saturating_add(1));
        }
        Self { limits, known: HashMap::new() }
    }

    fn stack(&mut self, builder: &mut ProfileBuilder, stack: &Stack) -> Vec<LocationId> {
        let calls = stack.frames.split_inclusive(|frame| !frame.parts.inlined);
        calls.map(|calls| self.location(builder, calls)).collect()
    }

    /// `calls` are those of one address, innermost first; never empty.
    fn location(&mut self, builder: &mut ProfileBuilder, calls: &[Arc<Frame>]) -> LocationId {
        let key: Vec<ContentId> = calls.iter().map(|frame| frame.id).collect();
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let parts = calls.last().map(|frame| &frame.parts).expect("split_inclusive gives no empty slice");
        let names: Vec<String> = calls.iter().map(|frame| name(&frame.parts)).collect();
        let lines: Vec<LineSpec<'_>> =
            calls.iter().zip(&names).map(|(frame, name)| line_spec(&frame.parts, name)).collect();
        let limit = self.limits.get(&(Arc::clone(&parts.binary), Arc::clone(&parts.build_id)));
        let mapping = (!parts.binary.is_empty() || !parts.build_id.is_empty()).then(|| {
            builder.mapping(&MappingSpec {
                // Addresses are bytes in the file.
                start: 0,
                limit: limit.copied().unwrap_or(u64::MAX),
                offset: 0,
                filename: &parts.binary,
                build_id: &parts.build_id,
            })
        });
        let location = builder.location(&LocationSpec {
            mapping,
            address: parts.address,
            kind: parts.kind,
            is_folded: false,
            lines: &lines,
        });
        self.known.insert(key, location);
        location
    }
}

fn name(frame: &FrameParts) -> String {
    match &*frame.function {
        "" => unnamed(frame),
        function => function.to_owned(),
    }
}

fn line_spec<'a>(frame: &'a FrameParts, name: &'a str) -> LineSpec<'a> {
    let system_name = if frame.system_name.is_empty() { name } else { &frame.system_name };
    let function = FunctionSpec { name, system_name, filename: &frame.file, start_line: frame.start_line };
    LineSpec { function, line: frame.line, column: frame.column }
}
