//! A profile as text, for people and for snapshots.

use std::fmt;

use crate::FrameKind;
use crate::proto::{Label, Line, Location, Mapping, Profile, Sample, ValueType};

/// The whole profile as text: types, header, mappings, then every sample with its stack, leaf first. Equal
/// profiles give equal text.
///
/// ```text
/// types: samples/count cpu/nanoseconds*
/// period: 52631578 cpu/nanoseconds
/// time: 1700000000.000000000
/// duration: 10.000000000
/// comment: 19 Hz
/// mapping 1: 0x400000-0x500000 +0x1000 /usr/bin/app build id c0ffee
/// samples: 1
///
/// 2 105263156 comm="app" pid=42
///   0x401000 inner app.c:12:3 (inlined)
///            outer app.c:40 native /usr/bin/app
/// ```
///
/// The star marks the sample type shown first. Control characters are escaped, so a name cannot move a
/// terminal's cursor. A broken profile renders too; a reference to nothing shows as `?`.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        header(f, self)?;
        for mapping in &self.mapping {
            write_mapping(f, self, mapping)?;
        }
        writeln!(f, "samples: {}", self.sample.len())?;
        for sample in &self.sample {
            write_sample(f, self, sample)?;
        }
        Ok(())
    }
}

fn header(f: &mut fmt::Formatter<'_>, profile: &Profile) -> fmt::Result {
    f.write_str("types:")?;
    let default = profile.default_sample_type_index();
    for (index, &value_type) in profile.sample_type.iter().enumerate() {
        let star = if default == Some(index) { "*" } else { "" };
        write!(f, " {}{star}", TypeName(profile, value_type))?;
    }
    writeln!(f)?;
    if let Some(period_type) = profile.period_type {
        writeln!(f, "period: {} {}", profile.period, TypeName(profile, period_type))?;
    }
    if profile.time_nanos != 0 {
        writeln!(f, "time: {}", Seconds(profile.time_nanos))?;
    }
    if profile.duration_nanos != 0 {
        writeln!(f, "duration: {}", Seconds(profile.duration_nanos))?;
    }
    for &comment in &profile.comment {
        writeln!(f, "comment: {}", Text(profile, comment))?;
    }
    for (name, string) in
        [("drop frames", profile.drop_frames), ("keep frames", profile.keep_frames), ("see", profile.doc_url)]
    {
        if string != 0 {
            writeln!(f, "{name}: {}", Text(profile, string))?;
        }
    }
    Ok(())
}

fn write_mapping(f: &mut fmt::Formatter<'_>, profile: &Profile, mapping: &Mapping) -> fmt::Result {
    let Mapping { id, memory_start, memory_limit, file_offset, filename, build_id, .. } = *mapping;
    write!(
        f,
        "mapping {id}: {memory_start:#x}-{memory_limit:#x} +{file_offset:#x} {}",
        Text(profile, filename)
    )?;
    if build_id != 0 {
        write!(f, " build id {}", Text(profile, build_id))?;
    }
    writeln!(f)
}

fn write_sample(f: &mut fmt::Formatter<'_>, profile: &Profile, sample: &Sample) -> fmt::Result {
    writeln!(f)?;
    let mut gap = "";
    for value in &sample.value {
        write!(f, "{gap}{value}")?;
        gap = " ";
    }
    for &label in &sample.label {
        write_label(f, profile, label)?;
    }
    writeln!(f)?;
    for &id in &sample.location_id {
        match profile.location(id) {
            Some(location) => write_location(f, profile, location)?,
            None => writeln!(f, "  ? location {id}")?,
        }
    }
    Ok(())
}

fn write_label(f: &mut fmt::Formatter<'_>, profile: &Profile, label: Label) -> fmt::Result {
    let Label { key, str, num, num_unit } = label;
    write!(f, " {}=", Text(profile, key))?;
    match (str, num_unit) {
        (0, 0) => write!(f, "{num}"),
        (0, unit) => write!(f, "{num}{}", Text(profile, unit)),
        (str, _) => write!(f, "{:?}", profile.string(str).unwrap_or("?")),
    }
}

fn write_location(f: &mut fmt::Formatter<'_>, profile: &Profile, location: &Location) -> fmt::Result {
    let address = format!("{:#x}", location.address);
    let width = address.len();
    if location.line.is_empty() {
        return writeln!(f, "  {address} ??{}", Origin(profile, location));
    }
    let outermost = location.line.len() - 1;
    for (index, &line) in location.line.iter().enumerate() {
        let shown = if index == 0 { address.as_str() } else { "" };
        write!(f, "  {shown:width$} ")?;
        write_line(f, profile, line)?;
        if index < outermost {
            writeln!(f, " (inlined)")?;
        } else {
            writeln!(f, "{}", Origin(profile, location))?;
        }
    }
    Ok(())
}

fn write_line(f: &mut fmt::Formatter<'_>, profile: &Profile, line: Line) -> fmt::Result {
    let Some(function) = profile.function(line.function_id) else {
        return write!(f, "? function {}", line.function_id);
    };
    write!(f, "{}", Text(profile, function.name))?;
    if function.system_name != 0 && function.system_name != function.name {
        write!(f, " [{}]", Text(profile, function.system_name))?;
    }
    if function.filename != 0 {
        write!(f, " {}", Text(profile, function.filename))?;
    }
    for number in [line.line, line.column] {
        if number != 0 {
            write!(f, ":{number}")?;
        }
    }
    Ok(())
}

/// The kind of a location and the file it is from, after a blank.
struct Origin<'a>(&'a Profile, &'a Location);

impl fmt::Display for Origin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(profile, location) = *self;
        let kind: FrameKind = profile.kind(location);
        let folded = if location.is_folded { " (folded)" } else { "" };
        write!(f, " {kind}{folded}")?;
        match (location.mapping_id, profile.mapping(location.mapping_id)) {
            (0, _) => Ok(()),
            (id, None) => write!(f, " ? mapping {id}"),
            (_, Some(mapping)) => write!(f, " {}", Text(profile, mapping.filename)),
        }
    }
}

/// A string of the table, with control characters escaped.
struct Text<'a>(&'a Profile, i64);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(profile, index) = *self;
        let Some(text) = profile.string(index) else { return write!(f, "? string {index}") };
        for c in text.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

/// `cpu/nanoseconds`.
struct TypeName<'a>(&'a Profile, ValueType);

impl fmt::Display for TypeName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(profile, ValueType { r#type, unit }) = *self;
        write!(f, "{}/{}", Text(profile, r#type), Text(profile, unit))
    }
}

/// Nanoseconds as seconds with nine decimals.
struct Seconds(i64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NANOS: u64 = 1_000_000_000;
        let sign = if self.0 < 0 { "-" } else { "" };
        let nanos = self.0.unsigned_abs();
        write!(f, "{sign}{}.{:09}", nanos / NANOS, nanos % NANOS)
    }
}

#[cfg(test)]
mod tests {
    use crate::fixture::{cpu, profile};
    use crate::proto::{Line, Location, Profile, Sample};

    #[test]
    fn a_profile_reads_well() {
        insta::assert_snapshot!(profile(), @r#"
        types: samples/count cpu/nanoseconds*
        period: 52631578 cpu/nanoseconds
        time: 1700000000.000000000
        duration: 10.000000000
        comment: 19 Hz
        see: https://example.org/cpu
        mapping 1: 0x400000-0x500000 +0x1000 /usr/bin/app build id c0ffee
        mapping 2: 0xffffffff81000000-0xffffffff82000000 +0x0 [kernel.kallsyms]
        samples: 2

        2 105263156 comm="app" pid=42
          0x401000 inner<T>() [_Z5innerv] app.cc:12:3 (inlined)
                   outer app.cc:40 native (folded) /usr/bin/app
          0x402000 ?? native /usr/bin/app

        1 52631578 comm="app" size=64bytes
          0xffffffff81001234 vfs_read kernel [kernel.kallsyms]
          0x401000 inner<T>() [_Z5innerv] app.cc:12:3 (inlined)
                   outer app.cc:40 native (folded) /usr/bin/app
          0x0 [truncated] marker
        "#);
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        let text = cpu(&[(&["a\x1b[2Jb\nc"], 1)]).to_string();
        assert!(text.contains("a\\u{1b}[2Jb\\nc"), "{text}");
        assert!(!text.contains('\x1b'), "{text}");
    }

    #[test]
    fn references_to_nothing_show() {
        let broken = Profile {
            comment: vec![9],
            sample: vec![Sample { location_id: vec![1, 2], value: vec![1], label: vec![] }],
            location: vec![Location {
                id: 1,
                mapping_id: 7,
                line: vec![Line { function_id: 8, ..Default::default() }],
                ..Default::default()
            }],
            ..Default::default()
        };
        insta::assert_snapshot!(broken, @"
        types:
        comment: ? string 9
        samples: 1

        1
          0x0 ? function 8 native ? mapping 7
          ? location 2
        ");
    }
}
