//! The form of a recorded heap: what was allocated and what is in use in one profile, as Go's runtime writes it.

use profiler_pprof::{
    Merger, OpsError,
    proto::{Profile, ValueType},
};

/// Source: Go, src/runtime/pprof/protomem.go: writeHeapProto.
const COLUMNS: [(&str, &str); 4] = [
    ("alloc_objects", "count"),
    ("alloc_space", "bytes"),
    ("inuse_objects", "count"),
    ("inuse_space", "bytes"),
];
/// Source: Go, src/runtime/pprof/pprof.go: writeHeap.
const DEFAULT_COLUMN: &str = "inuse_space";
/// What distinguishes it from a profile that Go writes of itself.
const SINCE: &str = "in use: of what was allocated while this was recorded";

/// Both in four columns; `None` where there is neither.
///
/// # Errors
/// For profiles that cannot be added up.
pub(super) fn profile(allocs: Option<Profile>, in_use: Option<Profile>) -> Result<Option<Profile>, OpsError> {
    let mut merger = Merger::default();
    for (profile, first) in [(allocs, 0), (in_use, 2)] {
        let Some(mut profile) = profile else { continue };
        widen(&mut profile, first);
        merger.add(&profile, &[])?;
    }
    if merger.profiles() == 0 { Ok(None) } else { merger.finish().map(Some) }
}

/// Makes a profile of two columns one of four, its own behind `first` others.
fn widen(profile: &mut Profile, first: usize) {
    profile.sample_type = COLUMNS
        .map(|(name, unit)| ValueType { r#type: string(profile, name), unit: string(profile, unit) })
        .into();
    profile.default_sample_type = string(profile, DEFAULT_COLUMN);
    let comment = string(profile, SINCE);
    profile.comment.push(comment);
    for sample in &mut profile.sample {
        let mut values = vec![0; COLUMNS.len()];
        values.iter_mut().skip(first).zip(&sample.value).for_each(|(to, value)| *to = *value);
        sample.value = values;
    }
}

/// Index of a string in the profile's table.
fn string(profile: &mut Profile, text: &str) -> i64 {
    let known = profile.string_table.iter().position(|known| known == text);
    let index = known.unwrap_or_else(|| {
        profile.string_table.push(text.to_owned());
        profile.string_table.len() - 1
    });
    i64::try_from(index).expect("a table in memory")
}

#[cfg(test)]
pub(super) mod tests {
    use profiler_pprof::{FrameKind, FunctionSpec, LineSpec, LocationSpec, ProfileBuilder, TypeSpec, check};

    use super::*;

    /// One sample in `function`.
    fn columns(types: [&str; 2], function: &str, values: [i64; 2]) -> Profile {
        let [objects, space] = types;
        let types = [TypeSpec::new(objects, "count"), TypeSpec::new(space, "bytes")];
        let mut builder = ProfileBuilder::new(&types, TypeSpec::new("space", "bytes"), 512);
        let function = FunctionSpec { name: function, system_name: function, filename: "", start_line: 0 };
        let lines = &[LineSpec { function, line: 0, column: 0 }];
        let kind = FrameKind::Native;
        let spec = LocationSpec { mapping: None, address: 0, kind, is_folded: false, lines };
        let location = builder.location(&spec);
        builder.sample(&[location], &values, &[]);
        builder.finish()
    }

    /// `keep` has allocated 3 of 30 bytes and holds 1 of 10; `drop_all` holds nothing of 4 of 40.
    pub(in crate::record) fn four_columns() -> Profile {
        let allocs = ["alloc_objects", "alloc_space"];
        let all = [columns(allocs, "keep", [3, 30]), columns(allocs, "drop_all", [4, 40])];
        let allocs = profiler_pprof::merge(&[&all[0], &all[1]]).expect("equal types");
        let in_use = columns(["inuse_objects", "inuse_space"], "keep", [1, 10]);
        profile(Some(allocs), Some(in_use)).expect("they add up").expect("of two")
    }

    #[test]
    fn what_is_allocated_and_what_is_in_use_meet_at_their_stack() {
        let profile = four_columns();
        check(&profile).expect("a profile");
        let mut values: Vec<_> = profile.sample.iter().map(|sample| sample.value.clone()).collect();
        values.sort();
        assert_eq!(values, [vec![3, 30, 1, 10], vec![4, 40, 0, 0]]);
        assert_eq!(profile.default_sample_type_index(), Some(3));
        assert_eq!(profile.period, 512);
    }

    #[test]
    fn either_may_be_missing() {
        assert_eq!(profile(None, None), Ok(None));
        let allocs = columns(["alloc_objects", "alloc_space"], "a", [1, 2]);
        let profile = profile(Some(allocs), None).expect("it adds up").expect("of one");
        assert_eq!(profile.sample[0].value, [1, 2, 0, 0]);
    }
}
