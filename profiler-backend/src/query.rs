//! Questions about stored profiles: which types and labels there are, totals over time, merged stacks.

mod binaries;
mod merge;
mod params;
mod pprof;
mod select;
mod series;

pub(crate) use self::{
    binaries::binaries,
    merge::merge,
    params::{MergeFormat, ParamError, Params},
    pprof::pprof,
    select::{label_names, label_values, profile_types},
    series::series,
};

/// Why a query was not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueryError {
    #[error(transparent)]
    Param(#[from] ParamError),
    #[error("the selection has more than {max} distinct {what}: narrow the time range or the query")]
    TooLarge { what: &'static str, max: usize },
}
