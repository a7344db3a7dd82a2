//! Parts: rows of one hour, written once, never changed.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arrow_array::{
    ArrayRef, BooleanArray, Int32Array, Int64Array, RecordBatch, TimestampMicrosecondArray,
    builder::{FixedSizeBinaryBuilder, ListBuilder},
};
use arrow_schema::ArrowError;
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ArrowReaderMetadata},
    basic::{Compression, Encoding, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
    schema::types::ColumnPath,
};

use super::{
    columns as col,
    columns::{id_array, map_array, text_array},
    layout::{Hour, Layout, TABLES, Table},
};
use crate::{
    model::{ContentId, NumberLabel, ProfileHead, SampleLabels, Series, ValueType},
    private,
    stack::{Frame, Stack},
};

/// Version of the tables; in every file as `profiler.format_version`.
const FORMAT_VERSION: &str = "1";
const KEY_FORMAT_VERSION: &str = "profiler.format_version";
/// Last write-ahead segment whose rows may be in this part.
const KEY_WAL_SEQUENCE: &str = "profiler.wal_sequence";
/// Names of the parts whose rows this one took over, separated by commas.
const KEY_REPLACES: &str = "profiler.replaces";
const KEY_TS_MIN: &str = "profiler.ts_min_us";
const KEY_TS_MAX: &str = "profiler.ts_max_us";
const KEY_SAMPLE_ROWS: &str = "profiler.sample_rows";

/// Rows a record batch, while writing and reading.
pub(crate) const BATCH_ROWS: usize = 8192;
/// Sizes that the layout was measured with: pruning skips whole row groups and pages.
const ROW_GROUP_ROWS: usize = 131_072;
const PAGE_ROWS: usize = 8192;

/// Why a part was not written or not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartError {
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("encode {path}")]
    Encode {
        path: PathBuf,
        #[source]
        source: ParquetError,
    },
    #[error("assemble rows of {path}")]
    Assemble {
        path: PathBuf,
        #[source]
        source: ArrowError,
    },
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: ParquetError,
    },
    #[error("decode {path}")]
    Decode {
        path: PathBuf,
        #[source]
        source: ArrowError,
    },
    #[error("decode {path}")]
    Column {
        path: PathBuf,
        #[source]
        source: col::ColumnError,
    },
    #[error("{path}: no usable {key} in the file's metadata")]
    Metadata { path: PathBuf, key: &'static str },
}

impl PartError {
    /// Whether the file system has no room, as opposed to being broken.
    pub(crate) fn is_full(&self) -> bool {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(current) = error {
            if let Some(io) = current.downcast_ref::<io::Error>() {
                return matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
            }
            error = current.source();
        }
        false
    }
}

pub(crate) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PartError {
    let path = path.to_owned();
    move |source| PartError::Io { operation, path, source }
}

/// One row of `samples`.
#[derive(Debug, Clone)]
pub(crate) struct SampleRow {
    pub(crate) series: Arc<Series>,
    pub(crate) start_us: i64,
    pub(crate) duration_ms: i32,
    pub(crate) value_type: ValueType,
    pub(crate) labels: Arc<SampleLabels>,
    pub(crate) stack_id: ContentId,
    pub(crate) value: i64,
}

impl SampleRow {
    /// Rows a query reads together lie together, and equal values lie side by side.
    fn key(&self) -> impl Ord + '_ {
        let cluster = self.series.labels.get(col::CLUSTER_LABEL).unwrap_or("");
        let series = (&*self.series.profile_type, cluster, &self.series.id);
        (series, &*self.value_type.name, &self.stack_id, self.start_us, &self.labels)
    }
}

/// The rows of a part before they are written; all of one hour.
#[derive(Debug, Default)]
pub(crate) struct PartRows {
    /// With the number of samples of each.
    pub(crate) profiles: Vec<(ProfileHead, i64)>,
    pub(crate) samples: Vec<SampleRow>,
    /// Each stack of `samples` once.
    pub(crate) stacks: Vec<Arc<Stack>>,
}

/// A part on disk. Dropping the last reference of an obsolete one deletes its files: a query that still reads them
/// finishes first.
#[derive(Debug)]
pub(crate) struct Part {
    layout: Layout,
    pub(crate) hour: Hour,
    pub(crate) name: String,
    /// First and last start of its profiles, in Unix microseconds.
    pub(crate) ts_min_us: i64,
    pub(crate) ts_max_us: i64,
    pub(crate) sample_rows: u64,
    pub(crate) wal_sequence: u64,
    pub(crate) replaces: Vec<String>,
    obsolete: AtomicBool,
    unreadable: AtomicBool,
}

impl Part {
    /// Writes `rows` durably under `name`. Until it returns `Ok`, the part does not exist for a restart.
    pub(crate) fn write(
        layout: &Layout,
        hour: Hour,
        name: String,
        mut rows: PartRows,
        wal_sequence: u64,
        replaces: Vec<String>,
    ) -> Result<Self, PartError> {
        rows.samples.sort_by(|a, b| a.key().cmp(&b.key()));
        rows.profiles.sort_by_key(|(profile, _)| (profile.series.id, profile.start_us));
        rows.stacks.sort_by_key(|stack| stack.id);
        let starts = || rows.profiles.iter().map(|(profile, _)| profile.start_us);
        let part = Self {
            layout: layout.clone(),
            hour,
            name,
            ts_min_us: starts().min().unwrap_or(0),
            ts_max_us: starts().max().unwrap_or(0),
            sample_rows: rows.samples.len() as u64,
            wal_sequence,
            replaces,
            obsolete: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
        };
        part.write_tables(&rows).inspect_err(|_| part.remove_temporaries())?;
        Ok(part)
    }

    fn write_tables(&self, rows: &PartRows) -> Result<(), PartError> {
        for table in TABLES {
            let path = self.layout.temporary(table, self.hour, &self.name);
            create_directories(self.layout.data_dir(), &self.layout.hour(table, self.hour))?;
            self.write_table(table, rows, &path)?;
        }
        for table in TABLES {
            let path = self.layout.file(table, self.hour, &self.name);
            let temporary = self.layout.temporary(table, self.hour, &self.name);
            fs::rename(&temporary, &path).map_err(io_error("rename", &temporary))?;
            // Before the next table: `profiles`, the last, must never be there without the others.
            sync_directory(&self.layout.hour(table, self.hour))?;
        }
        Ok(())
    }

    fn write_table(&self, table: Table, rows: &PartRows, path: &Path) -> Result<(), PartError> {
        let batches = || -> Result<Batches<'_>, ArrowError> {
            Ok(match table {
                Table::Frames => batches(distinct_frames(&rows.stacks), frame_batch),
                Table::Stacks => batches(rows.stacks.iter().collect(), stack_batch),
                Table::Samples => batches(rows.samples.iter().collect(), sample_batch),
                Table::Profiles => batches(rows.profiles.iter().collect(), profile_batch),
            })
        };
        let assemble = |source| PartError::Assemble { path: path.to_owned(), source };
        let encode = |source| PartError::Encode { path: path.to_owned(), source };
        let file = private::file_options().create(true).truncate(true).open(path);
        let file = file.map_err(io_error("create", path))?;
        let mut writer: Option<ArrowWriter<File>> = None;
        for batch in batches().map_err(assemble)? {
            let batch = batch.map_err(assemble)?;
            let writer = match &mut writer {
                Some(writer) => writer,
                None => {
                    let file = file.try_clone().map_err(io_error("duplicate", path))?;
                    let properties = self.properties(table);
                    writer
                        .insert(ArrowWriter::try_new(file, batch.schema(), Some(properties)).map_err(encode)?)
                }
            };
            writer.write(&batch).map_err(encode)?;
        }
        writer.map_or(Ok(()), |writer| writer.close().map(drop)).map_err(encode)?;
        file.sync_all().map_err(io_error("sync", path))
    }

    fn properties(&self, table: Table) -> WriterProperties {
        let pairs = [
            (KEY_FORMAT_VERSION, FORMAT_VERSION.to_owned()),
            (KEY_WAL_SEQUENCE, self.wal_sequence.to_string()),
            (KEY_REPLACES, self.replaces.join(",")),
            (KEY_TS_MIN, self.ts_min_us.to_string()),
            (KEY_TS_MAX, self.ts_max_us.to_string()),
            (KEY_SAMPLE_ROWS, self.sample_rows.to_string()),
        ];
        let metadata = pairs.map(|(key, value)| KeyValue::new(key.to_owned(), value)).to_vec();
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
            .set_data_page_row_count_limit(PAGE_ROWS)
            .set_write_batch_size(PAGE_ROWS)
            .set_key_value_metadata(Some(metadata));
        match table {
            Table::Samples | Table::Profiles => properties
                .set_column_dictionary_enabled(ColumnPath::from(col::TS), false)
                .set_column_encoding(ColumnPath::from(col::TS), Encoding::DELTA_BINARY_PACKED)
                .build(),
            Table::Frames | Table::Stacks => properties.build(),
        }
    }

    fn remove_temporaries(&self) {
        for table in TABLES {
            // What stays is removed by the next start.
            let _ = fs::remove_file(self.layout.temporary(table, self.hour, &self.name));
        }
    }

    /// Reads what a part is from the footer of its `profiles` file.
    pub(crate) fn open(layout: &Layout, hour: Hour, name: String) -> Result<Self, PartError> {
        let path = layout.file(Table::Profiles, hour, &name);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let metadata = ArrowReaderMetadata::load(&file, Default::default())
            .map_err(|source| PartError::Read { path: path.clone(), source })?;
        let pairs = metadata.metadata().file_metadata().key_value_metadata();
        let value = |key: &'static str| {
            let pair = pairs.into_iter().flatten().find(|pair| pair.key == key);
            pair.and_then(|pair| pair.value.as_deref()).ok_or(PartError::Metadata { path: path.clone(), key })
        };
        let number = |key: &'static str| {
            let unusable = |_| PartError::Metadata { path: path.clone(), key };
            value(key)?.parse::<i64>().map_err(unusable)
        };
        if value(KEY_FORMAT_VERSION)? != FORMAT_VERSION {
            return Err(PartError::Metadata { path: path.clone(), key: KEY_FORMAT_VERSION });
        }
        let replaces = value(KEY_REPLACES)?.split(',').filter(|name| !name.is_empty());
        Ok(Self {
            layout: layout.clone(),
            hour,
            name,
            ts_min_us: number(KEY_TS_MIN)?,
            ts_max_us: number(KEY_TS_MAX)?,
            sample_rows: number(KEY_SAMPLE_ROWS)?.cast_unsigned(),
            wal_sequence: number(KEY_WAL_SEQUENCE)?.cast_unsigned(),
            replaces: replaces.map(str::to_owned).collect(),
            obsolete: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
        })
    }

    pub(crate) fn path(&self, table: Table) -> PathBuf {
        self.layout.file(table, self.hour, &self.name)
    }

    /// Remembers that it cannot be read; true the first time.
    pub(crate) fn mark_unreadable(&self) -> bool {
        !self.unreadable.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_unreadable(&self) -> bool {
        self.unreadable.load(Ordering::Relaxed)
    }

    /// Its files go away with the last reference.
    pub(crate) fn retire(&self) {
        self.obsolete.store(true, Ordering::Release);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.obsolete.load(Ordering::Acquire) {
            remove_files(&self.layout, self.hour, &self.name);
        }
    }
}

/// Deletes a part's files, the one that makes it exist first, and the directories that are empty then.
pub(crate) fn remove_files(layout: &Layout, hour: Hour, name: &str) {
    for table in TABLES.iter().rev() {
        let path = layout.file(*table, hour, name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("remove {}: {error}", path.display());
            }
            _ => {}
        }
        // Fails while they hold anything, which is the point.
        let directory = layout.hour(*table, hour);
        let emptied = fs::remove_dir(&directory);
        if let (Ok(()), Some(date)) = (emptied, directory.parent()) {
            let _ = fs::remove_dir(date);
        }
    }
}

/// Creates `directory` below `root`, which exists, and syncs each parent that got a new entry.
pub(crate) fn create_directories(root: &Path, directory: &Path) -> Result<(), PartError> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent().filter(|parent| parent.starts_with(root)) {
        create_directories(root, parent)?;
        match private::directory_builder().create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("create", directory)(error));
            }
            _ => sync_directory(parent)?,
        }
    }
    Ok(())
}

fn sync_directory(path: &Path) -> Result<(), PartError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(io_error("sync", path))
}

type Batches<'a> = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + 'a>;

/// Cuts rows into batches; an empty table gets one empty batch, which carries its columns.
fn batches<'a, T: 'a>(
    rows: Vec<&'a T>,
    assemble: fn(&[&'a T]) -> Result<RecordBatch, ArrowError>,
) -> Batches<'a> {
    let count = rows.len().div_ceil(BATCH_ROWS).max(1);
    Box::new((0..count).map(move |index| {
        let rest = rows.get(index * BATCH_ROWS..).unwrap_or_default();
        assemble(rest.get(..BATCH_ROWS).unwrap_or(rest))
    }))
}

fn distinct_frames(stacks: &[Arc<Stack>]) -> Vec<&Frame> {
    let mut seen = HashSet::new();
    let all = stacks.iter().flat_map(|stack| stack.frames.iter());
    let mut frames: Vec<&Frame> = all.filter(|frame| seen.insert(frame.id)).map(|frame| &**frame).collect();
    frames.sort_by(|a, b| (&a.parts.binary, a.id).cmp(&(&b.parts.binary, b.id)));
    frames
}

fn frame_batch(frames: &[&Frame]) -> Result<RecordBatch, ArrowError> {
    let parts = || frames.iter().map(|frame| &frame.parts);
    let integers = |values: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
    RecordBatch::try_from_iter([
        (col::FRAME_ID, id_array(frames.iter().map(|frame| frame.id))),
        (col::KIND, text_array(parts().map(|p| p.kind.name()))),
        (col::INLINED, Arc::new(BooleanArray::from_iter(parts().map(|p| Some(p.inlined)))) as ArrayRef),
        (col::FUNCTION, text_array(parts().map(|p| &*p.function))),
        (col::SYSTEM_NAME, text_array(parts().map(|p| &*p.system_name))),
        (col::FILE, text_array(parts().map(|p| &*p.file))),
        (col::START_LINE, integers(parts().map(|p| p.start_line).collect())),
        (col::LINE, integers(parts().map(|p| p.line).collect())),
        (col::COLUMN, integers(parts().map(|p| p.column).collect())),
        // Kernel addresses become negative: not every engine knows unsigned integers.
        (col::ADDRESS, integers(parts().map(|p| p.address.cast_signed()).collect())),
        (col::BINARY, text_array(parts().map(|p| &*p.binary))),
        (col::BUILD_ID, text_array(parts().map(|p| &*p.build_id))),
    ])
}

fn stack_batch(stacks: &[&Arc<Stack>]) -> Result<RecordBatch, ArrowError> {
    let mut frames = ListBuilder::new(FixedSizeBinaryBuilder::new(ContentId::BYTES as i32));
    for stack in stacks {
        for frame in &stack.frames {
            frames.values().append_value(frame.id.0)?;
        }
        frames.append(true);
    }
    RecordBatch::try_from_iter([
        (col::STACK_ID, id_array(stacks.iter().map(|stack| stack.id))),
        (col::FRAMES, Arc::new(frames.finish()) as ArrayRef),
    ])
}

fn sample_batch(rows: &[&SampleRow]) -> Result<RecordBatch, ArrowError> {
    let start_us: Vec<i64> = rows.iter().map(|row| row.start_us).collect();
    let duration_ms: Vec<i32> = rows.iter().map(|row| row.duration_ms).collect();
    let values: Vec<i64> = rows.iter().map(|row| row.value).collect();
    let mut columns: Vec<(&str, ArrayRef, bool)> = vec![
        (col::TS, Arc::new(TimestampMicrosecondArray::from(start_us).with_timezone("UTC")), false),
        (col::DURATION_MS, Arc::new(Int32Array::from(duration_ms)), false),
    ];
    columns.extend(series_columns(rows.len(), |row| &rows[row].series));
    columns.extend([
        (col::SAMPLE_TYPE, text_array(rows.iter().map(|row| &*row.value_type.name)), false),
        (col::SAMPLE_UNIT, text_array(rows.iter().map(|row| &*row.value_type.unit)), false),
        (col::STACK_ID, id_array(rows.iter().map(|row| row.stack_id)), false),
        (col::VALUE, Arc::new(Int64Array::from(values)), false),
    ]);
    columns.extend(sample_label_columns(rows));
    RecordBatch::try_from_iter_with_nullable(columns)
}

fn sample_label_columns<'a>(rows: &[&SampleRow]) -> Vec<(&'a str, ArrayRef, bool)> {
    let text = |name| text_array(rows.iter().map(|row| row.labels.texts.get(name).unwrap_or("")));
    let mut columns: Vec<_> = col::TEXT_LABELS.iter().map(|name| (*name, text(name), false)).collect();
    let pids = rows.iter().map(|row| row.labels.numbers.iter().find(|l| is_pid(l)).map(|l| l.value));
    let others = rows.iter().map(|row| col::other_text_labels(&row.labels.texts));
    let numbers = rows.iter().map(|row| {
        let numbers = row.labels.numbers.iter().filter(|label| !is_pid(label));
        numbers.map(|label| (&*label.name, number_text(label)))
    });
    columns.extend([
        (col::PID, Arc::new(Int64Array::from_iter(pids)) as ArrayRef, true),
        (col::SAMPLE_LABELS, map_array(others), false),
        (col::NUMBER_LABELS, map_array(numbers), false),
    ]);
    columns
}

/// Whether the label goes to the `pid` column, which has no place for a unit.
fn is_pid(label: &NumberLabel) -> bool {
    &*label.name == col::PID && label.unit.is_empty()
}

/// A numeric label in the map: `64 bytes`, or `64` without a unit.
fn number_text(label: &NumberLabel) -> String {
    format!("{} {}", label.value, label.unit).trim_end().to_owned()
}

/// The columns that tell the series of a row, in `samples` and in `profiles`.
fn series_columns<'a>(
    count: usize,
    series: impl Fn(usize) -> &'a Arc<Series>,
) -> Vec<(&'static str, ArrayRef, bool)> {
    let all = || (0..count).map(&series);
    let mut columns = vec![
        (col::PROFILE_TYPE, text_array(all().map(|s| &*s.profile_type)), false),
        (col::TEMPORALITY, text_array(all().map(|s| s.temporality.name())), false),
        (col::SERIES_ID, id_array(all().map(|s| s.id).collect::<Vec<_>>().into_iter()), false),
    ];
    for name in col::SERIES_LABELS {
        columns.push((name, text_array(all().map(|s| s.labels.get(name).unwrap_or(""))), false));
    }
    columns.push((col::LABELS, map_array(all().map(|s| col::other_series_labels(&s.labels))), false));
    columns
}

fn profile_batch(rows: &[&(ProfileHead, i64)]) -> Result<RecordBatch, ArrowError> {
    let heads = || rows.iter().map(|(head, _)| head);
    let start_us: Vec<i64> = heads().map(|head| head.start_us).collect();
    let integers = |values: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
    let sample_types: Vec<String> = heads().map(|head| join_types(&head.sample_types)).collect();
    let defaults = heads().map(|h| h.sample_types.get(h.default_sample_type).map_or("", |t| &*t.name));
    let period_types: Vec<String> =
        heads().map(|head| join_types(std::slice::from_ref(&head.period_type))).collect();
    let comments: Vec<String> = heads().map(|head| head.comments.join("\n")).collect();
    let label_names: Vec<String> = heads().map(|head| head.label_names.join("\n")).collect();
    let mut columns: Vec<(&str, ArrayRef, bool)> = vec![
        (col::TS, Arc::new(TimestampMicrosecondArray::from(start_us).with_timezone("UTC")), false),
        (col::DURATION_NS, integers(heads().map(|head| head.duration_ns).collect()), false),
    ];
    columns.extend(series_columns(rows.len(), |row| &rows[row].0.series));
    columns.extend([
        (col::BATCH_ID, id_array(rows.iter().map(|(head, _)| head.batch)), false),
        (col::SAMPLE_TYPES, text_array(sample_types.iter().map(String::as_str)), false),
        (col::DEFAULT_SAMPLE_TYPE, text_array(defaults), false),
        (col::PERIOD_TYPE, text_array(period_types.iter().map(String::as_str)), false),
        (col::PERIOD, integers(heads().map(|head| head.period).collect()), false),
        (col::COMMENTS, text_array(comments.iter().map(String::as_str)), false),
        (col::LABEL_NAMES, text_array(label_names.iter().map(String::as_str)), false),
        (col::SAMPLES, integers(rows.iter().map(|(_, samples)| *samples).collect()), false),
    ]);
    RecordBatch::try_from_iter_with_nullable(columns)
}

/// `samples/count,cpu/nanoseconds`; a push with `/` or `,` in these words is refused.
fn join_types(types: &[ValueType]) -> String {
    let words: Vec<String> = types.iter().map(|t| format!("{}/{}", t.name, t.unit)).collect();
    words.join(",")
}
