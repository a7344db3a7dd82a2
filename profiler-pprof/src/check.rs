//! Do the tables of a profile fit together?

use std::fmt;

use crate::proto::{Function, Label, Location, Mapping, Profile, Sample, ValueType};

/// A table of a profile, as errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// profile.proto: Profile.mapping.
    Mapping,
    /// profile.proto: Profile.location.
    Location,
    /// profile.proto: Profile.function.
    Function,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mapping => "mapping",
            Self::Location => "location",
            Self::Function => "function",
        })
    }
}

/// The first broken relation of a profile. Indices count from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// `string_table[0]` must exist and be empty.
    #[error("string_table[0] is not the empty string")]
    FirstString,
    /// A field refers to a string outside the table.
    #[error("{owner}[{index}].{field} is string {string}, of {strings} strings")]
    StringRange {
        /// Table the field belongs to; `profile` for the profile itself.
        owner: &'static str,
        /// Index in that table; for `profile`, the index in a repeated field, or 0.
        index: usize,
        /// Name in profile.proto.
        field: &'static str,
        /// The reference.
        string: i64,
        /// Length of the string table.
        strings: usize,
    },
    /// Samples without a type to their values.
    #[error("there are samples but no sample types")]
    NoSampleTypes,
    /// The default sample type is not one of the sample types.
    #[error("default_sample_type {name:?} is not among the sample types")]
    DefaultSampleType {
        /// What it names.
        name: String,
    },
    /// Ids must be 1, 2, 3, ... in the order of the table.
    #[error("{table}[{index}] has id {id}, not {}", index + 1)]
    Id {
        /// The table.
        table: Table,
        /// Index in the table.
        index: usize,
        /// The id found.
        id: u64,
    },
    /// A mapping ends before it starts.
    #[error("mapping[{index}] ends at {limit:#x}, before its start {start:#x}")]
    MappingRange {
        /// Index in the table.
        index: usize,
        /// profile.proto: Mapping.memory_start.
        start: u64,
        /// profile.proto: Mapping.memory_limit.
        limit: u64,
    },
    /// A location refers to a mapping that does not exist.
    #[error("location[{index}] refers to mapping {mapping_id}, of {mappings}")]
    LocationMapping {
        /// Index in the table.
        index: usize,
        /// The reference.
        mapping_id: u64,
        /// Length of the mapping table.
        mappings: usize,
    },
    /// A line refers to a function that does not exist, or to none.
    #[error("location[{index}].line[{line}] refers to function {function_id}, of {functions}")]
    LineFunction {
        /// Index of the location.
        index: usize,
        /// Index of the line.
        line: usize,
        /// The reference.
        function_id: u64,
        /// Length of the function table.
        functions: usize,
    },
    /// A sample refers to a location that does not exist.
    #[error("sample[{index}].location_id[{frame}] is {location_id}, of {locations}")]
    SampleLocation {
        /// Index of the sample.
        index: usize,
        /// Index in the stack, 0 is the leaf.
        frame: usize,
        /// The reference.
        location_id: u64,
        /// Length of the location table.
        locations: usize,
    },
    /// A sample needs one value per sample type.
    #[error("sample[{index}] has {values} values, for {types} sample types")]
    SampleValues {
        /// Index of the sample.
        index: usize,
        /// Values found.
        values: usize,
        /// Number of sample types.
        types: usize,
    },
    /// A label without a key.
    #[error("sample[{index}].label[{label}] has no key")]
    LabelKey {
        /// Index of the sample.
        index: usize,
        /// Index of the label.
        label: usize,
    },
    /// A label that is both a string and a number.
    #[error("sample[{index}].label[{label}] has a string and a number")]
    LabelValue {
        /// Index of the sample.
        index: usize,
        /// Index of the label.
        label: usize,
    },
}

/// Checks every relation of the profile: what `go tool pprof` demands (google/pprof `profile/profile.go`:
/// CheckValid, and the range checks of its decoder), what Parca demands on top (ids 1..n in order, keyed
/// labels), and what profile.proto says of mappings, labels and the default sample type.
///
/// After it, the lookups of [`Profile`] find every reference.
///
/// # Errors
/// The first relation that does not hold.
pub fn check(profile: &Profile) -> Result<(), CheckError> {
    let checker = Checker { profile };
    checker.header()?;
    for (index, mapping) in profile.mapping.iter().enumerate() {
        checker.mapping(index, mapping)?;
    }
    for (index, function) in profile.function.iter().enumerate() {
        checker.function(index, function)?;
    }
    for (index, location) in profile.location.iter().enumerate() {
        checker.location(index, location)?;
    }
    for (index, sample) in profile.sample.iter().enumerate() {
        checker.sample(index, sample)?;
    }
    Ok(())
}

struct Checker<'a> {
    profile: &'a Profile,
}

impl Checker<'_> {
    fn header(&self) -> Result<(), CheckError> {
        let profile = self.profile;
        if profile.string_table.first().is_none_or(|first| !first.is_empty()) {
            return Err(CheckError::FirstString);
        }
        if profile.sample_type.is_empty() && !profile.sample.is_empty() {
            return Err(CheckError::NoSampleTypes);
        }
        for (index, sample_type) in profile.sample_type.iter().enumerate() {
            self.value_type("sample_type", index, *sample_type)?;
        }
        if let Some(period_type) = profile.period_type {
            self.value_type("period_type", 0, period_type)?;
        }
        for (index, &comment) in profile.comment.iter().enumerate() {
            self.string("profile", index, "comment", comment)?;
        }
        self.string("profile", 0, "drop_frames", profile.drop_frames)?;
        self.string("profile", 0, "keep_frames", profile.keep_frames)?;
        self.string("profile", 0, "doc_url", profile.doc_url)?;
        self.default_sample_type()
    }

    fn default_sample_type(&self) -> Result<(), CheckError> {
        let index = self.profile.default_sample_type;
        let name = self.string("profile", 0, "default_sample_type", index)?;
        if name.is_empty() || self.profile.sample_type_index(name).is_some() {
            return Ok(());
        }
        Err(CheckError::DefaultSampleType { name: name.to_owned() })
    }

    fn value_type(&self, owner: &'static str, index: usize, value_type: ValueType) -> Result<(), CheckError> {
        self.string(owner, index, "type", value_type.r#type)?;
        self.string(owner, index, "unit", value_type.unit)?;
        Ok(())
    }

    fn mapping(&self, index: usize, mapping: &Mapping) -> Result<(), CheckError> {
        check_id(Table::Mapping, index, mapping.id)?;
        self.string("mapping", index, "filename", mapping.filename)?;
        self.string("mapping", index, "build_id", mapping.build_id)?;
        let (start, limit) = (mapping.memory_start, mapping.memory_limit);
        if start > limit { Err(CheckError::MappingRange { index, start, limit }) } else { Ok(()) }
    }

    fn function(&self, index: usize, function: &Function) -> Result<(), CheckError> {
        check_id(Table::Function, index, function.id)?;
        self.string("function", index, "name", function.name)?;
        self.string("function", index, "system_name", function.system_name)?;
        self.string("function", index, "filename", function.filename)?;
        Ok(())
    }

    fn location(&self, index: usize, location: &Location) -> Result<(), CheckError> {
        check_id(Table::Location, index, location.id)?;
        let mapping_id = location.mapping_id;
        if mapping_id != 0 && self.profile.mapping(mapping_id).is_none() {
            return Err(CheckError::LocationMapping {
                index,
                mapping_id,
                mappings: self.profile.mapping.len(),
            });
        }
        let functions = self.profile.function.len();
        let dangling =
            location.line.iter().position(|line| self.profile.function(line.function_id).is_none());
        match dangling {
            Some(line) => {
                let function_id = location.line[line].function_id;
                Err(CheckError::LineFunction { index, line, function_id, functions })
            }
            None => Ok(()),
        }
    }

    fn sample(&self, index: usize, sample: &Sample) -> Result<(), CheckError> {
        let (values, types) = (sample.value.len(), self.profile.sample_type.len());
        if values != types {
            return Err(CheckError::SampleValues { index, values, types });
        }
        for (frame, &location_id) in sample.location_id.iter().enumerate() {
            if self.profile.location(location_id).is_none() {
                let locations = self.profile.location.len();
                return Err(CheckError::SampleLocation { index, frame, location_id, locations });
            }
        }
        sample.label.iter().enumerate().try_for_each(|(at, label)| self.label(index, at, *label))
    }

    fn label(&self, index: usize, label: usize, value: Label) -> Result<(), CheckError> {
        let Label { key, str, num, num_unit } = value;
        if self.string("sample", index, "label.key", key)?.is_empty() {
            return Err(CheckError::LabelKey { index, label });
        }
        self.string("sample", index, "label.str", str)?;
        self.string("sample", index, "label.num_unit", num_unit)?;
        if str != 0 && (num != 0 || num_unit != 0) {
            return Err(CheckError::LabelValue { index, label });
        }
        Ok(())
    }

    fn string(
        &self,
        owner: &'static str,
        index: usize,
        field: &'static str,
        string: i64,
    ) -> Result<&str, CheckError> {
        let strings = self.profile.string_table.len();
        self.profile.string(string).ok_or(CheckError::StringRange { owner, index, field, string, strings })
    }
}

fn check_id(table: Table, index: usize, id: u64) -> Result<(), CheckError> {
    let in_order = usize::try_from(id).is_ok_and(|id| id == index + 1);
    if in_order { Ok(()) } else { Err(CheckError::Id { table, index, id }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::profile;

    const END: i64 = i64::MAX;

    #[track_caller]
    fn refuse(break_it: impl FnOnce(&mut Profile), expect: &str) {
        let mut broken = profile();
        break_it(&mut broken);
        let error = check(&broken).expect_err("must be refused");
        assert_eq!(error.to_string(), expect);
    }

    /// Points one reference to a string that the fixture does not have, on either side of the table.
    #[track_caller]
    fn refuse_string(field: impl Fn(&mut Profile) -> &mut i64, name: &str) {
        let strings = profile().string_table.len();
        for string in [-1, i64::try_from(strings).unwrap(), END] {
            let expect = format!("{name} is string {string}, of {strings} strings");
            refuse(|p| *field(p) = string, &expect);
        }
    }

    #[test]
    fn what_the_builder_makes_is_valid() {
        assert_eq!(check(&profile()), Ok(()));
    }

    #[test]
    fn the_string_table_starts_with_the_empty_string() {
        refuse(|p| p.string_table[0].push('x'), "string_table[0] is not the empty string");
        refuse(|p| p.string_table.clear(), "string_table[0] is not the empty string");
    }

    #[test]
    fn every_reference_to_a_string_resolves() {
        refuse_string(|p| &mut p.sample_type[1].r#type, "sample_type[1].type");
        refuse_string(|p| &mut p.sample_type[1].unit, "sample_type[1].unit");
        refuse_string(|p| &mut p.period_type.as_mut().unwrap().r#type, "period_type[0].type");
        refuse_string(|p| &mut p.period_type.as_mut().unwrap().unit, "period_type[0].unit");
        refuse_string(|p| &mut p.drop_frames, "profile[0].drop_frames");
        refuse_string(|p| &mut p.keep_frames, "profile[0].keep_frames");
        refuse_string(|p| &mut p.doc_url, "profile[0].doc_url");
        refuse_string(|p| &mut p.comment[0], "profile[0].comment");
        refuse_string(|p| &mut p.default_sample_type, "profile[0].default_sample_type");
        refuse_string(|p| &mut p.mapping[1].filename, "mapping[1].filename");
        refuse_string(|p| &mut p.mapping[1].build_id, "mapping[1].build_id");
        refuse_string(|p| &mut p.function[2].name, "function[2].name");
        refuse_string(|p| &mut p.function[2].system_name, "function[2].system_name");
        refuse_string(|p| &mut p.function[2].filename, "function[2].filename");
        refuse_string(|p| &mut p.sample[1].label[0].key, "sample[1].label.key");
        refuse_string(|p| &mut p.sample[1].label[0].str, "sample[1].label.str");
        refuse_string(|p| &mut p.sample[1].label[1].num_unit, "sample[1].label.num_unit");
    }

    #[test]
    fn ids_are_one_to_n_in_order() {
        refuse(|p| p.mapping[1].id = 0, "mapping[1] has id 0, not 2");
        refuse(|p| p.mapping[1].id = 1, "mapping[1] has id 1, not 2");
        refuse(|p| p.mapping.swap(0, 1), "mapping[0] has id 2, not 1");
        refuse(|p| p.function[2].id = 0, "function[2] has id 0, not 3");
        refuse(|p| p.function[2].id = 9, "function[2] has id 9, not 3");
        refuse(|p| p.location[1].id = 0, "location[1] has id 0, not 2");
        refuse(|p| p.location[1].id = u64::MAX, "location[1] has id 18446744073709551615, not 2");
    }

    #[test]
    fn every_reference_to_an_id_resolves() {
        refuse(|p| p.location[0].mapping_id = 3, "location[0] refers to mapping 3, of 2");
        refuse(|p| p.location[0].line[1].function_id = 5, "location[0].line[1] refers to function 5, of 4");
        refuse(|p| p.location[0].line[1].function_id = 0, "location[0].line[1] refers to function 0, of 4");
        refuse(|p| p.sample[1].location_id[2] = 5, "sample[1].location_id[2] is 5, of 4");
        refuse(|p| p.sample[1].location_id[2] = 0, "sample[1].location_id[2] is 0, of 4");
    }

    #[test]
    fn a_mapping_does_not_end_before_its_start() {
        refuse(
            |p| p.mapping[0].memory_limit = 0x3f_ffff,
            "mapping[0] ends at 0x3fffff, before its start 0x400000",
        );
    }

    #[test]
    fn every_sample_has_one_value_per_type() {
        refuse(|p| p.sample[1].value.truncate(1), "sample[1] has 1 values, for 2 sample types");
        refuse(|p| p.sample[1].value.push(1), "sample[1] has 3 values, for 2 sample types");
        refuse(|p| p.sample_type.clear(), "there are samples but no sample types");
    }

    #[test]
    fn the_default_sample_type_exists() {
        refuse(
            |p| p.default_sample_type = p.comment[0],
            "default_sample_type \"19 Hz\" is not among the sample types",
        );
    }

    #[test]
    fn a_label_has_a_key_and_one_value() {
        refuse(|p| p.sample[0].label[1].key = 0, "sample[0].label[1] has no key");
        refuse(|p| p.sample[0].label[0].num = 1, "sample[0].label[0] has a string and a number");
        refuse(|p| p.sample[0].label[0].num_unit = 1, "sample[0].label[0] has a string and a number");
    }
}
