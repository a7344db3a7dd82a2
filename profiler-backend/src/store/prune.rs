//! Which rows of a `samples` file a scan must read, from the bounds that the file states per row group and page.

use std::{collections::BTreeSet, ops::Range};

use parquet::{
    arrow::arrow_reader::RowSelection,
    file::{
        metadata::{ParquetMetaData, RowGroupMetaData},
        page_index::column_index::ColumnIndexMetaData,
    },
};

use super::{columns as col, read::Scan};

/// What is left of a file.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) row_groups: Vec<usize>,
    /// Rows of these row groups, counted through all of them.
    pub(crate) rows: RowSelection,
}

/// Leaves out row groups and pages that cannot hold a wanted series. Rows are sorted by container, then by series;
/// bounds that are not stated exclude nothing.
pub(crate) fn prune(metadata: &ParquetMetaData, scan: &Scan) -> Kept {
    let series: BTreeSet<&[u8]> = scan.series.keys().map(|id| id.0.as_slice()).collect();
    let clusters: BTreeSet<&[u8]> = scan.clusters.iter().map(String::as_bytes).collect();
    let wanted = [(col::SERIES_ID, &series), (col::CLUSTER_LABEL, &clusters)];
    let mut row_groups = Vec::new();
    let mut ranges: [Vec<Range<usize>>; 2] = Default::default();
    let mut total = 0;
    for (index, group) in metadata.row_groups().iter().enumerate() {
        if !wanted.iter().all(|(name, values)| group_may_hold(group, name, values)) {
            continue;
        }
        let rows = usize::try_from(group.num_rows()).unwrap_or(0);
        for ((name, values), ranges) in wanted.iter().zip(&mut ranges) {
            let pages = pages(metadata, index, name, rows, values);
            ranges.extend(pages.into_iter().map(|page| total + page.start..total + page.end));
        }
        row_groups.push(index);
        total += rows;
    }
    let [by_series, by_cluster] =
        ranges.map(|ranges| RowSelection::from_consecutive_ranges(ranges.into_iter(), total));
    Kept { row_groups, rows: by_series.intersection(&by_cluster) }
}

fn holds_any(min: &[u8], max: &[u8], wanted: &BTreeSet<&[u8]>) -> bool {
    min <= max && wanted.range(min..=max).next().is_some()
}

fn group_may_hold(group: &RowGroupMetaData, name: &str, wanted: &BTreeSet<&[u8]>) -> bool {
    let column = group.columns().iter().find(|column| column.column_path().string() == name);
    let statistics = column.and_then(|column| column.statistics());
    let bounds = statistics.and_then(|s| s.min_bytes_opt().zip(s.max_bytes_opt()));
    bounds.is_none_or(|(min, max)| holds_any(min, max, wanted))
}

/// Rows of the pages that may hold a wanted value, in a row group of `rows` rows.
fn pages(
    metadata: &ParquetMetaData,
    row_group: usize,
    name: &str,
    rows: usize,
    wanted: &BTreeSet<&[u8]>,
) -> Vec<Range<usize>> {
    let all = || std::iter::once(0..rows).collect();
    let columns = metadata.file_metadata().schema_descr().columns();
    let Some(column) = columns.iter().position(|column| column.path().string() == name) else { return all() };
    let index = metadata.page_index_for_row_group(row_group);
    let bounds = match index.column_index(column) {
        Some(ColumnIndexMetaData::BYTE_ARRAY(bounds) | ColumnIndexMetaData::FIXED_LEN_BYTE_ARRAY(bounds)) => {
            bounds
        }
        _ => return all(),
    };
    let Some(offsets) = index.offset_index(column) else { return all() };
    let starts: Vec<usize> = offsets
        .page_locations()
        .iter()
        .map(|page| usize::try_from(page.first_row_index).unwrap_or(0))
        .collect();
    let ends = starts.iter().skip(1).copied().chain([rows]);
    let pages = starts.iter().copied().zip(ends).enumerate();
    let kept = pages.filter(|(page, _)| match bounds.min_value(*page).zip(bounds.max_value(*page)) {
        Some((min, max)) => holds_any(min, max, wanted),
        None => true,
    });
    kept.map(|(_, (start, end))| start..end.max(start)).collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path, sync::Arc};

    use parquet::{arrow::arrow_reader::ArrowReaderOptions, file::metadata::PageIndexPolicy};
    use profiler_pprof::push::Temporality;

    use super::*;
    use crate::{
        model::{ContentId, Labels, SampleLabels, Series, ValueType},
        store::{
            layout::{Hour, Layout, Table},
            part::{Part, PartRows, SampleRow},
            read::LabelNeed,
        },
    };

    const ROWS_EACH: i64 = 30_000;

    fn series(container: &str) -> Arc<Series> {
        let labels = Labels::new(vec![("container".into(), container.into())]);
        Arc::new(Series::new("cpu".into(), Temporality::Delta, labels))
    }

    fn row(series: &Arc<Series>, number: i64) -> SampleRow {
        SampleRow {
            series: Arc::clone(series),
            start_us: number,
            duration_ms: 10,
            value_type: ValueType { name: "cpu".into(), unit: "nanoseconds".into() },
            labels: Arc::new(SampleLabels::default()),
            stack_id: ContentId([0; 16]),
            value: number,
        }
    }

    fn write(data_dir: &Path, containers: &[Arc<Series>]) -> Part {
        let samples = containers.iter().flat_map(|series| (0..ROWS_EACH).map(|number| row(series, number)));
        let rows = PartRows { samples: samples.collect(), ..PartRows::default() };
        let layout = Layout::new(data_dir);
        Part::write(&layout, Hour::of(0), "x".to_owned(), rows, 0, Vec::new()).expect("write")
    }

    fn scan(series: &Arc<Series>) -> Scan {
        Scan {
            range_us: 0..i64::MAX,
            series: HashMap::from([(series.id, 0)]),
            clusters: series.labels.get("container").map(str::to_owned).into_iter().collect(),
            labels: LabelNeed::Named(BTreeSet::new()),
        }
    }

    #[test]
    fn only_pages_that_may_hold_the_container_are_read_and_every_row_of_it_is_found() {
        let directory = tempfile::tempdir().expect("tempdir");
        let containers = ["a", "b", "c", "d", "e", "f"].map(series);
        let part = write(directory.path(), &containers);
        let file = std::fs::File::open(part.path(Table::Samples)).expect("open");
        let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
        let metadata =
            parquet::arrow::arrow_reader::ArrowReaderMetadata::load(&file, options).expect("metadata");
        for container in &containers {
            let kept = prune(metadata.metadata(), &scan(container));
            let (rows, wanted) = (kept.rows.row_count(), ROWS_EACH as usize);
            assert!((wanted..wanted + 2 * 8192).contains(&rows), "{rows} rows read for {wanted}");
            let mut sum = 0;
            part.samples(&scan(container), |row| sum += row.value).expect("read");
            assert_eq!(sum, (0..ROWS_EACH).sum::<i64>());
        }
        let absent = scan(&series("absent"));
        assert_eq!(prune(metadata.metadata(), &absent).rows.row_count(), 0);
    }
}
