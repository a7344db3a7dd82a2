//! Reading parts back: profiles, pruned samples, stacks.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    ops::Range,
    path::PathBuf,
    sync::Arc,
};

use arrow_array::{BooleanArray, RecordBatch};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    file::metadata::PageIndexPolicy,
};
use profiler_pprof::FrameKind;

use super::{
    columns as col,
    columns::{ColumnError, IdLists, Ids, Maps, OptionalIntegers, Texts, booleans, integers, timestamps},
    layout::Table,
    part::{BATCH_ROWS, Part, PartError, PartRows, SampleRow, io_error},
    prune::{Kept, prune},
};
use crate::{
    model::{
        BatchId, ContentId, Labels, NumberLabel, ProfileHead, SampleLabels, Series, Strings, ValueType,
        temporality_of_name,
    },
    stack::{Frame, FrameParts, Stack, StackCache},
};

/// Labels that rows of a scan are asked for; columns of others are not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LabelNeed {
    Named(BTreeSet<String>),
    All,
}

impl LabelNeed {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Named(names) => names.contains(name),
            Self::All => true,
        }
    }

    /// Whether the maps, which hold what has no column, must be read.
    fn has_others(&self) -> bool {
        let has_column = |name: &str| name == col::PID || col::TEXT_LABELS.contains(&name);
        match self {
            Self::Named(names) => names.iter().any(|name| !has_column(name)),
            Self::All => true,
        }
    }
}

/// Which samples a scan visits.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Starts of profiles, in Unix microseconds.
    pub(crate) range_us: Range<i64>,
    /// The wanted series with the number each row reports for it.
    pub(crate) series: HashMap<ContentId, u32>,
    /// Values of `container` among these series: what parts are clustered by.
    pub(crate) clusters: BTreeSet<String>,
    pub(crate) labels: LabelNeed,
}

/// One value of one stack.
pub(crate) struct Row<'a> {
    pub(crate) series: u32,
    /// The window of its profile.
    pub(crate) start_us: i64,
    pub(crate) duration_ms: i64,
    pub(crate) type_name: &'a str,
    pub(crate) type_unit: &'a str,
    pub(crate) stack: ContentId,
    pub(crate) value: i64,
    pub(crate) labels: RowLabels<'a>,
}

/// Sample labels of a row, where they are.
pub(crate) enum RowLabels<'a> {
    Memory(&'a SampleLabels),
    Part { columns: &'a LabelColumns<'a>, row: usize },
}

impl RowLabels<'_> {
    /// The value of a label the scan asked for.
    pub(crate) fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        match self {
            Self::Memory(labels) => labels.get(name),
            Self::Part { columns, row } => columns.get(name, *row),
        }
    }

    /// All labels, for a scan that asked for all.
    pub(crate) fn to_labels(&self) -> SampleLabels {
        match self {
            Self::Memory(labels) => (*labels).clone(),
            Self::Part { columns, row } => columns.all(*row, &mut Strings::default()),
        }
    }
}

/// The label columns of a batch, as far as the scan needs them.
pub(crate) struct LabelColumns<'a> {
    texts: Vec<(&'static str, Texts<'a>)>,
    pid: Option<OptionalIntegers<'a>>,
    others: Option<(Maps<'a>, Maps<'a>)>,
}

impl<'a> LabelColumns<'a> {
    fn of(batch: &'a RecordBatch, need: &LabelNeed) -> Result<Self, ColumnError> {
        let mut texts = Vec::new();
        for name in col::TEXT_LABELS.into_iter().filter(|name| need.has(name)) {
            texts.push((name, Texts::of(batch, name)?));
        }
        let pid = need.has(col::PID).then(|| OptionalIntegers::of(batch, col::PID)).transpose()?;
        let maps = || Ok((Maps::of(batch, col::SAMPLE_LABELS)?, Maps::of(batch, col::NUMBER_LABELS)?));
        let others = need.has_others().then(maps).transpose()?;
        Ok(Self { texts, pid, others })
    }

    fn columns(need: &LabelNeed) -> Vec<&'static str> {
        let hot = col::TEXT_LABELS.into_iter().chain([col::PID]).filter(|name| need.has(name));
        let maps = [col::SAMPLE_LABELS, col::NUMBER_LABELS].into_iter().filter(|_| need.has_others());
        hot.chain(maps).collect()
    }

    fn get(&self, name: &str, row: usize) -> Option<Cow<'_, str>> {
        if let Some((_, texts)) = self.texts.iter().find(|(column, _)| *column == name) {
            return Some(texts.get(row)).filter(|text| !text.is_empty()).map(Cow::Borrowed);
        }
        if let Some(pid) = self.pid.as_ref().filter(|_| name == col::PID).and_then(|pid| pid.get(row)) {
            return Some(Cow::Owned(pid.to_string()));
        }
        let (texts, numbers) = self.others.as_ref()?;
        let find = |map: &Maps<'a>| map.row(row).find(|(key, _)| *key == name).map(|(_, value)| value);
        // A number is compared without its unit.
        let number = || find(numbers).map(|text| text.split_once(' ').map_or(text, |(number, _)| number));
        find(texts).or_else(number).map(Cow::Borrowed)
    }

    fn all(&self, row: usize, strings: &mut Strings) -> SampleLabels {
        let mut texts: Vec<(Arc<str>, Arc<str>)> = Vec::new();
        for (name, column) in &self.texts {
            texts.push((strings.get(name), strings.get(column.get(row))));
        }
        let mut numbers = Vec::new();
        if let Some(value) = self.pid.as_ref().and_then(|pid| pid.get(row)) {
            numbers.push(NumberLabel { name: strings.get(col::PID), value, unit: strings.get("") });
        }
        if let Some((other_texts, other_numbers)) = &self.others {
            texts.extend(other_texts.row(row).map(|(key, value)| (strings.get(key), strings.get(value))));
            for (key, text) in other_numbers.row(row) {
                let (number, unit) = text.split_once(' ').unwrap_or((text, ""));
                let Ok(value) = number.parse() else { continue };
                numbers.push(NumberLabel { name: strings.get(key), value, unit: strings.get(unit) });
            }
        }
        numbers.sort();
        SampleLabels { texts: Labels::new(texts), numbers: numbers.into_boxed_slice() }
    }
}

/// One Parquet file with some of its columns.
struct Reader {
    path: PathBuf,
    batches: ParquetRecordBatchReader,
}

impl Reader {
    fn open(path: PathBuf, columns: Option<&[&str]>) -> Result<Self, PartError> {
        Self::open_pruned(path, columns, None)
    }

    /// Leaves out rows that `scan` cannot want; others that it does not want may stay.
    fn open_pruned(path: PathBuf, columns: Option<&[&str]>, scan: Option<&Scan>) -> Result<Self, PartError> {
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let read = |source| PartError::Read { path: path.clone(), source };
        let policy = if scan.is_some() { PageIndexPolicy::Optional } else { PageIndexPolicy::Skip };
        let options = ArrowReaderOptions::new().with_page_index_policy(policy);
        let mut builder =
            ParquetRecordBatchReaderBuilder::try_new_with_options(file, options).map_err(read)?;
        if let Some(scan) = scan {
            let Kept { row_groups, rows } = prune(builder.metadata(), scan);
            builder = builder.with_row_groups(row_groups).with_row_selection(rows);
        }
        if let Some(names) = columns {
            let mask = ProjectionMask::columns(builder.parquet_schema(), names.iter().copied());
            builder = builder.with_projection(mask);
        }
        let batches = builder.with_batch_size(BATCH_ROWS).build().map_err(read)?;
        Ok(Self { path, batches })
    }

    fn for_each(
        self,
        mut visit: impl FnMut(&RecordBatch) -> Result<(), ColumnError>,
    ) -> Result<(), PartError> {
        let Self { path, batches } = self;
        for batch in batches {
            let batch = batch.map_err(|source| PartError::Decode { path: path.clone(), source })?;
            visit(&batch).map_err(|source| PartError::Column { path: path.clone(), source })?;
        }
        Ok(())
    }
}

impl Part {
    /// Hands each profile that starts in `range_us` and is of `profile_type`, if one is given, to `visit`.
    pub(crate) fn profiles(
        &self,
        range_us: &Range<i64>,
        profile_type: Option<&str>,
        mut visit: impl FnMut(&ProfileHead, i64),
    ) -> Result<(), PartError> {
        let mut decoder = ProfileDecoder::default();
        Reader::open(self.path(Table::Profiles), None)?.for_each(|batch| {
            decoder.batch(
                batch,
                |start_us, row_type| {
                    range_us.contains(&start_us) && profile_type.is_none_or(|wanted| wanted == row_type)
                },
                &mut visit,
            )
        })
    }

    /// The ids of the pushes that are in this part.
    pub(crate) fn batch_ids(&self) -> Result<HashSet<BatchId>, PartError> {
        let mut ids = HashSet::new();
        Reader::open(self.path(Table::Profiles), Some(&[col::BATCH_ID]))?.for_each(|batch| {
            let column = Ids::of(batch, col::BATCH_ID)?;
            ids.extend((0..batch.num_rows()).map(|row| column.get(row)));
            Ok(())
        })?;
        Ok(ids)
    }

    /// Hands each sample that `scan` selects to `visit`.
    pub(crate) fn samples(&self, scan: &Scan, mut visit: impl FnMut(&Row<'_>)) -> Result<(), PartError> {
        let mut columns = vec![
            col::TS,
            col::DURATION_MS,
            col::SERIES_ID,
            col::SAMPLE_TYPE,
            col::SAMPLE_UNIT,
            col::STACK_ID,
            col::VALUE,
        ];
        columns.extend(LabelColumns::columns(&scan.labels));
        Reader::open_pruned(self.path(Table::Samples), Some(&columns), Some(scan))?
            .for_each(|batch| visit_samples(batch, scan, &mut visit))
    }

    /// Hands each stack of this part that `wanted` names to `visit`.
    pub(crate) fn stacks(
        &self,
        cache: &StackCache,
        wanted: impl Fn(&ContentId) -> bool,
        mut visit: impl FnMut(Arc<Stack>),
    ) -> Result<(), PartError> {
        let mut stacks: Vec<(ContentId, Vec<ContentId>)> = Vec::new();
        Reader::open(self.path(Table::Stacks), None)?.for_each(|batch| {
            let (ids, lists) = (Ids::of(batch, col::STACK_ID)?, IdLists::of(batch, col::FRAMES)?);
            let rows = (0..batch.num_rows()).filter(|&row| wanted(&ids.get(row)));
            stacks.extend(rows.map(|row| (ids.get(row), lists.row(row).collect())));
            Ok(())
        })?;
        let frames = self.frames(cache, stacks.iter().flat_map(|(_, frames)| frames).copied().collect())?;
        for (id, frame_ids) in stacks {
            let stack: Option<Vec<_>> = frame_ids.iter().map(|id| frames.get(id).cloned()).collect();
            let stack = stack.map(|frames| cache.stack(frames)).filter(|stack| stack.id == id);
            let stack = stack.ok_or_else(|| PartError::Column {
                path: self.path(Table::Stacks),
                source: ColumnError::new(col::STACK_ID, "is not the hash of the part's frames"),
            })?;
            visit(stack);
        }
        Ok(())
    }

    fn frames(
        &self,
        cache: &StackCache,
        wanted: HashSet<ContentId>,
    ) -> Result<HashMap<ContentId, Arc<Frame>>, PartError> {
        let mut frames = HashMap::with_capacity(wanted.len());
        let mut strings = Strings::default();
        Reader::open(self.path(Table::Frames), None)?.for_each(|batch| {
            let (ids, columns) = (Ids::of(batch, col::FRAME_ID)?, FrameColumns::of(batch)?);
            for row in (0..batch.num_rows()).filter(|&row| wanted.contains(&ids.get(row))) {
                let parts = columns.parts(row, &mut strings);
                frames.extend(parts.map(|parts| (ids.get(row), cache.frame(parts))));
            }
            Ok(())
        })?;
        Ok(frames)
    }

    /// Everything in this part, for compaction.
    pub(crate) fn rows(&self, cache: &StackCache) -> Result<PartRows, PartError> {
        let mut rows = PartRows::default();
        let mut series: HashMap<ContentId, Arc<Series>> = HashMap::new();
        self.profiles(&(i64::MIN..i64::MAX), None, |profile, samples| {
            series.insert(profile.series.id, Arc::clone(&profile.series));
            rows.profiles.push((profile.clone(), samples));
        })?;
        let mut decoder = SampleDecoder::default();
        Reader::open(self.path(Table::Samples), None)?
            .for_each(|batch| decoder.batch(batch, &series, &mut rows.samples))?;
        self.stacks(cache, |_| true, |stack| rows.stacks.push(stack))?;
        Ok(rows)
    }
}

fn visit_samples(
    batch: &RecordBatch,
    scan: &Scan,
    visit: &mut impl FnMut(&Row<'_>),
) -> Result<(), ColumnError> {
    let (starts, series) = (timestamps(batch, col::TS)?, Ids::of(batch, col::SERIES_ID)?);
    let (names, units) = (Texts::of(batch, col::SAMPLE_TYPE)?, Texts::of(batch, col::SAMPLE_UNIT)?);
    let (stacks, values) = (Ids::of(batch, col::STACK_ID)?, integers(batch, col::VALUE)?);
    let durations = col::small_integers(batch, col::DURATION_MS)?;
    let columns = LabelColumns::of(batch, &scan.labels)?;
    // Rows are sorted by series: the answer for one row mostly holds for the next.
    let mut last: Option<(ContentId, Option<u32>)> = None;
    for (row, ((&start_us, &duration_ms), &value)) in starts.iter().zip(durations).zip(values).enumerate() {
        let id = series.get(row);
        let wanted = match last {
            Some((known, wanted)) if known == id => wanted,
            _ => scan.series.get(&id).copied(),
        };
        last = Some((id, wanted));
        if let Some(series) = wanted.filter(|_| scan.range_us.contains(&start_us)) {
            visit(&Row {
                series,
                start_us,
                duration_ms: duration_ms.into(),
                type_name: names.get(row),
                type_unit: units.get(row),
                stack: stacks.get(row),
                value,
                labels: RowLabels::Part { columns: &columns, row },
            });
        }
    }
    Ok(())
}

/// Decodes rows of `profiles`, sharing what repeats.
#[derive(Default)]
struct ProfileDecoder {
    strings: Strings,
    series: HashMap<ContentId, Arc<Series>>,
    sample_types: HashMap<String, Arc<[ValueType]>>,
}

impl ProfileDecoder {
    fn batch(
        &mut self,
        batch: &RecordBatch,
        wanted: impl Fn(i64, &str) -> bool,
        visit: &mut impl FnMut(&ProfileHead, i64),
    ) -> Result<(), ColumnError> {
        let columns = SeriesColumns::of(batch)?;
        let (starts, durations) = (timestamps(batch, col::TS)?, integers(batch, col::DURATION_NS)?);
        let (batches, samples) = (Ids::of(batch, col::BATCH_ID)?, integers(batch, col::SAMPLES)?);
        let (types, defaults) =
            (Texts::of(batch, col::SAMPLE_TYPES)?, Texts::of(batch, col::DEFAULT_SAMPLE_TYPE)?);
        let (period_types, periods) = (Texts::of(batch, col::PERIOD_TYPE)?, integers(batch, col::PERIOD)?);
        let (comments, label_names) = (Texts::of(batch, col::COMMENTS)?, Texts::of(batch, col::LABEL_NAMES)?);
        let numbers = starts.iter().zip(durations).zip(samples).zip(periods).enumerate();
        for (row, (((&start_us, &duration_ns), &samples), &period)) in numbers {
            if !wanted(start_us, columns.profile_types.get(row)) {
                continue;
            }
            let sample_types = self.sample_types(types.get(row));
            let default = sample_types.iter().position(|t| &*t.name == defaults.get(row));
            let head = ProfileHead {
                series: self.series(&columns, row)?,
                batch: batches.get(row),
                start_us,
                duration_ns,
                default_sample_type: default.unwrap_or(0),
                sample_types,
                period_type: split_type(period_types.get(row), &mut self.strings),
                period,
                comments: comments.get(row).lines().map(|line| self.strings.get(line)).collect(),
                label_names: label_names.get(row).lines().map(|name| self.strings.get(name)).collect(),
            };
            visit(&head, samples);
        }
        Ok(())
    }

    fn series(&mut self, columns: &SeriesColumns<'_>, row: usize) -> Result<Arc<Series>, ColumnError> {
        let id = columns.ids.get(row);
        if let Some(series) = self.series.get(&id) {
            return Ok(Arc::clone(series));
        }
        let series = Arc::new(columns.series(row, &mut self.strings)?);
        self.series.insert(id, Arc::clone(&series));
        Ok(series)
    }

    fn sample_types(&mut self, text: &str) -> Arc<[ValueType]> {
        if let Some(known) = self.sample_types.get(text) {
            return Arc::clone(known);
        }
        let types: Arc<[ValueType]> =
            text.split(',').map(|word| split_type(word, &mut self.strings)).collect();
        self.sample_types.insert(text.to_owned(), Arc::clone(&types));
        types
    }
}

fn split_type(text: &str, strings: &mut Strings) -> ValueType {
    let (name, unit) = text.split_once('/').unwrap_or((text, ""));
    ValueType { name: strings.get(name), unit: strings.get(unit) }
}

struct SeriesColumns<'a> {
    ids: Ids<'a>,
    profile_types: Texts<'a>,
    temporalities: Texts<'a>,
    labels: Vec<(&'static str, Texts<'a>)>,
    others: Maps<'a>,
}

impl<'a> SeriesColumns<'a> {
    fn of(batch: &'a RecordBatch) -> Result<Self, ColumnError> {
        let labels = col::SERIES_LABELS.into_iter().map(|name| Ok((name, Texts::of(batch, name)?)));
        Ok(Self {
            ids: Ids::of(batch, col::SERIES_ID)?,
            profile_types: Texts::of(batch, col::PROFILE_TYPE)?,
            temporalities: Texts::of(batch, col::TEMPORALITY)?,
            labels: labels.collect::<Result<_, _>>()?,
            others: Maps::of(batch, col::LABELS)?,
        })
    }

    fn series(&self, row: usize, strings: &mut Strings) -> Result<Series, ColumnError> {
        let own = self.labels.iter().map(|(name, column)| (*name, column.get(row)));
        let labels = own.chain(self.others.row(row));
        let labels =
            Labels::new(labels.map(|(name, value)| (strings.get(name), strings.get(value))).collect());
        let temporality = temporality_of_name(self.temporalities.get(row))
            .ok_or_else(|| ColumnError::new(col::TEMPORALITY, "holds an unknown word"))?;
        let series = Series::new(strings.get(self.profile_types.get(row)), temporality, labels);
        match series.id == self.ids.get(row) {
            true => Ok(series),
            false => Err(ColumnError::new(col::SERIES_ID, "is not the hash of its labels")),
        }
    }
}

/// Decodes rows of `samples` in full, sharing what repeats.
#[derive(Default)]
struct SampleDecoder {
    strings: Strings,
    labels: HashSet<Arc<SampleLabels>>,
}

impl SampleDecoder {
    fn batch(
        &mut self,
        batch: &RecordBatch,
        series: &HashMap<ContentId, Arc<Series>>,
        rows: &mut Vec<SampleRow>,
    ) -> Result<(), ColumnError> {
        let (starts, series_ids) = (timestamps(batch, col::TS)?, Ids::of(batch, col::SERIES_ID)?);
        let durations = col::small_integers(batch, col::DURATION_MS)?;
        let (names, units) = (Texts::of(batch, col::SAMPLE_TYPE)?, Texts::of(batch, col::SAMPLE_UNIT)?);
        let (stacks, values) = (Ids::of(batch, col::STACK_ID)?, integers(batch, col::VALUE)?);
        let columns = LabelColumns::of(batch, &LabelNeed::All)?;
        for (row, ((&start_us, &duration_ms), &value)) in starts.iter().zip(durations).zip(values).enumerate()
        {
            let series = series.get(&series_ids.get(row));
            let series = series.ok_or_else(|| ColumnError::new(col::SERIES_ID, "names an unknown series"))?;
            let labels = columns.all(row, &mut self.strings);
            rows.push(SampleRow {
                series: Arc::clone(series),
                start_us,
                duration_ms,
                value_type: ValueType {
                    name: self.strings.get(names.get(row)),
                    unit: self.strings.get(units.get(row)),
                },
                labels: self.shared(labels),
                stack_id: stacks.get(row),
                value,
            });
        }
        Ok(())
    }

    fn shared(&mut self, labels: SampleLabels) -> Arc<SampleLabels> {
        if let Some(known) = self.labels.get(&labels) {
            return Arc::clone(known);
        }
        let labels = Arc::new(labels);
        self.labels.insert(Arc::clone(&labels));
        labels
    }
}

struct FrameColumns<'a> {
    kinds: Texts<'a>,
    inlined: &'a BooleanArray,
    functions: Texts<'a>,
    system_names: Texts<'a>,
    files: Texts<'a>,
    start_lines: &'a [i64],
    lines: &'a [i64],
    columns: &'a [i64],
    addresses: &'a [i64],
    binaries: Texts<'a>,
    build_ids: Texts<'a>,
}

impl<'a> FrameColumns<'a> {
    fn of(batch: &'a RecordBatch) -> Result<Self, ColumnError> {
        Ok(Self {
            kinds: Texts::of(batch, col::KIND)?,
            inlined: booleans(batch, col::INLINED)?,
            functions: Texts::of(batch, col::FUNCTION)?,
            system_names: Texts::of(batch, col::SYSTEM_NAME)?,
            files: Texts::of(batch, col::FILE)?,
            start_lines: integers(batch, col::START_LINE)?,
            lines: integers(batch, col::LINE)?,
            columns: integers(batch, col::COLUMN)?,
            addresses: integers(batch, col::ADDRESS)?,
            binaries: Texts::of(batch, col::BINARY)?,
            build_ids: Texts::of(batch, col::BUILD_ID)?,
        })
    }

    /// `None` for a row that the batch does not have.
    fn parts(&self, row: usize, strings: &mut Strings) -> Option<FrameParts> {
        Some(FrameParts {
            kind: kind_of_name(self.kinds.get(row)),
            inlined: self.inlined.value(row),
            function: strings.get(self.functions.get(row)),
            system_name: strings.get(self.system_names.get(row)),
            file: strings.get(self.files.get(row)),
            start_line: *self.start_lines.get(row)?,
            line: *self.lines.get(row)?,
            column: *self.columns.get(row)?,
            address: self.addresses.get(row)?.cast_unsigned(),
            binary: strings.get(self.binaries.get(row)),
            build_id: strings.get(self.build_ids.get(row)),
        })
    }
}

fn kind_of_name(name: &str) -> FrameKind {
    FrameKind::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or_default()
}
