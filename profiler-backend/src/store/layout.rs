//! Where things lie in the data directory.
//!
//! ```text
//! <data dir>/lock                                                one backend at a time
//! <data dir>/wal/<sequence>.wal                                  see wal.rs
//! <data dir>/v1/<table>/date=YYYY-MM-DD/hour=HH/part-<name>.parquet
//! ```
//! A part is one file of the same name in each table. The file in `profiles` is written last: it alone makes the part
//! exist. Hours are UTC, by the start of a profile.

use std::path::{Path, PathBuf};

use chrono::{DateTime, NaiveDate, NaiveTime};

const US_PER_HOUR: i64 = 3_600_000_000;

/// The tables of a part, in the order they are made visible.
pub(crate) const TABLES: [Table; 4] = [Table::Frames, Table::Stacks, Table::Samples, Table::Profiles];

/// One directory of Parquet files with the same columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// One row a frame: what a call is.
    Frames,
    /// One row a stack: its frames.
    Stacks,
    /// One row a value: a stack of a profile, for one sample type.
    Samples,
    /// One row a pushed profile.
    Profiles,
}

impl Table {
    fn directory(self) -> &'static str {
        match self {
            Self::Frames => "frames",
            Self::Stacks => "stacks",
            Self::Samples => "samples",
            Self::Profiles => "profiles",
        }
    }
}

/// An hour since the Unix epoch, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hour(i64);

impl Hour {
    pub(crate) fn of(unix_us: i64) -> Self {
        Self(unix_us.div_euclid(US_PER_HOUR))
    }

    /// First microsecond of the next hour.
    pub(crate) fn end_us(self) -> i64 {
        self.0.saturating_add(1).saturating_mul(US_PER_HOUR)
    }

    /// `date=2026-11-21/hour=10`.
    fn directory(self) -> PathBuf {
        let start = DateTime::from_timestamp(self.0.saturating_mul(3600), 0).unwrap_or_default();
        PathBuf::from(start.format("date=%Y-%m-%d").to_string()).join(start.format("hour=%H").to_string())
    }

    fn from_directories(date: &str, hour: &str) -> Option<Self> {
        let date = NaiveDate::parse_from_str(date.strip_prefix("date=")?, "%Y-%m-%d").ok()?;
        let hour = hour.strip_prefix("hour=")?.parse().ok()?;
        let start = date.and_time(NaiveTime::from_hms_opt(hour, 0, 0)?).and_utc();
        Some(Self(start.timestamp().div_euclid(3600)))
    }
}

/// Paths below a data directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    data_dir: PathBuf,
}

impl Layout {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned() }
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.data_dir.join("lock")
    }

    pub(crate) fn wal(&self) -> PathBuf {
        self.data_dir.join("wal")
    }

    pub(crate) fn table(&self, table: Table) -> PathBuf {
        self.data_dir.join("v1").join(table.directory())
    }

    pub(crate) fn hour(&self, table: Table, hour: Hour) -> PathBuf {
        self.table(table).join(hour.directory())
    }

    pub(crate) fn file(&self, table: Table, hour: Hour, part: &str) -> PathBuf {
        self.hour(table, hour).join(format!("part-{part}.parquet"))
    }

    /// Where a file is written before it gets its name; other engines skip names with a leading dot.
    pub(crate) fn temporary(&self, table: Table, hour: Hour, part: &str) -> PathBuf {
        self.hour(table, hour).join(format!(".part-{part}.parquet.tmp"))
    }
}

/// What a file in an hour's directory is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// With the part's name.
    Part(String),
    /// Left by a write that did not finish.
    Temporary,
    /// Not ours.
    Foreign,
}

pub(crate) fn file_kind(name: &str) -> FileKind {
    if name.starts_with(".part-") && name.ends_with(".tmp") {
        return FileKind::Temporary;
    }
    match name.strip_prefix("part-").and_then(|rest| rest.strip_suffix(".parquet")) {
        Some(part) => FileKind::Part(part.to_owned()),
        None => FileKind::Foreign,
    }
}

/// The hours that have a directory in `table`, with their directories, oldest first.
pub(crate) fn hours(layout: &Layout, table: Table) -> std::io::Result<Vec<(Hour, PathBuf)>> {
    let mut hours = Vec::new();
    for (date, date_path) in directories(&layout.table(table))? {
        for (hour, path) in directories(&date_path)? {
            hours.extend(Hour::from_directories(&date, &hour).map(|hour| (hour, path)));
        }
    }
    hours.sort();
    Ok(hours)
}

fn directories(path: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in path.read_dir()? {
        let entry = entry?;
        if let (true, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string()) {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_is_found_again_from_its_directories() {
        let hour = Hour::of(1_795_255_200_000_000);
        assert_eq!(hour.directory(), Path::new("date=2026-11-21/hour=10"));
        assert_eq!(Hour::from_directories("date=2026-11-21", "hour=10"), Some(hour));
        assert_eq!(hour.end_us(), 1_795_258_800_000_000);
        assert_eq!(Hour::from_directories("date=2026-11-21", "hour=24"), None);
        assert_eq!(Hour::from_directories("date=2026-11-31", "hour=01"), None);
    }

    #[test]
    fn files_are_told_apart_by_name() {
        assert_eq!(file_kind("part-17.parquet"), FileKind::Part("17".to_owned()));
        assert_eq!(file_kind(".part-17.parquet.tmp"), FileKind::Temporary);
        assert_eq!(file_kind("README"), FileKind::Foreign);
    }
}
