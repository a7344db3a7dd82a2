//! The tables of real libraries against gimli's evaluation of the same call frame information.
//!
//! For every row of every FDE, registers and stack memory are made up; gimli's rules and expressions are evaluated over
//! them, the common step is run over them with the rule that the table finds, and both callers must be the same.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod dwarf;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs};

use dwarf::{Bytes, Dwarf, Machine, compare_callers};
use gimli::{
    BaseAddresses, CieOrFde, CommonInformationEntry, EhFrame, FrameDescriptionEntry, LittleEndian,
    UnwindContext, UnwindSection, UnwindTableRow,
};
use object::{Object, ObjectSection};
use profiler_common::unwind::UnwindRule;
use profiler_unwind::{Architecture, Inexpressible, RuleSet, UnwindError, UnwindTable, from_elf};

#[derive(Default, Debug)]
struct Compared {
    fdes: u64,
    rows: u64,
    invalid_rows: u64,
    /// Rows whose caller's rbx is in no place that a rule can name.
    rbx_lost_rows: u64,
    unsound_fdes: u64,
    overlapping_fdes: u64,
}

/// Compares every row of every live FDE.
#[track_caller]
fn compare(path: &Path) -> Compared {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let table = from_elf(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = object::File::parse(&*bytes).unwrap();
    let eh_frame = file.section_by_name(".eh_frame").expect("the libraries here have an .eh_frame");
    let bases = BaseAddresses::default().set_eh_frame(eh_frame.address());
    let machine = Machine::new(table.architecture());
    let mut section = EhFrame::new(eh_frame.data().unwrap(), LittleEndian);
    section.set_vendor(machine.vendor);

    let mut compared = Compared::default();
    let mut ends = BTreeMap::new();
    let mut context = UnwindContext::new();
    let mut entries = section.entries(&bases);
    while let Some(entry) = entries.next().unwrap() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let fde = partial.parse(EhFrame::cie_from_offset).unwrap();
        if fde.initial_address() == 0 || fde.len() == 0 {
            continue;
        }
        if ends.insert(fde.initial_address(), fde.end_address()).is_some() {
            compared.overlapping_fdes += 1;
            continue;
        }
        compared.fdes += 1;
        if !is_sound(&fde, &section, &bases) {
            // The table marks the whole function, and counts it as one row.
            assert_eq!(table.find(fde.initial_address()), Some(&UnwindRule::INVALID));
            compared.unsound_fdes += 1;
            compared.invalid_rows += 1;
            continue;
        }
        let mut rows = fde.rows(&section, &bases, &mut context).unwrap();
        while let Some(row) = rows.next_row().unwrap() {
            if row.start_address() == row.end_address() {
                continue;
            }
            compared.rows += 1;
            match compare_row(&table, row, &machine, &section, fde.cie()) {
                Some(knows_rbx) => compared.rbx_lost_rows += u64::from(!knows_rbx),
                None => compared.invalid_rows += 1,
            }
        }
    }
    let next_starts = ends.keys().skip(1);
    compared.overlapping_fdes +=
        ends.values().zip(next_starts).filter(|(end, start)| end > start).count() as u64;
    assert_eq!(compared.overlapping_fdes, 0, "{}", path.display());
    let inexpressible = table.counts().inexpressible_rows_total();
    assert_eq!(compared.invalid_rows, inexpressible, "{}", path.display());
    compared
}

/// gimli can evaluate all its instructions.
fn is_sound<'a>(
    fde: &FrameDescriptionEntry<Bytes<'a>>,
    section: &EhFrame<Bytes<'a>>,
    bases: &BaseAddresses,
) -> bool {
    let mut context = UnwindContext::new();
    let Ok(mut rows) = fde.rows(section, bases, &mut context) else { return false };
    loop {
        match rows.next_row() {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Compares a row at its ends, and tells whether the rule knows rbx; `None` where the table has no rule for it.
#[track_caller]
fn compare_row(
    table: &UnwindTable,
    row: &UnwindTableRow<usize>,
    machine: &Machine,
    section: &EhFrame<Bytes<'_>>,
    cie: &CommonInformationEntry<Bytes<'_>>,
) -> Option<bool> {
    let mut knows_rbx = true;
    for ip in [row.start_address(), row.end_address() - 1] {
        let rule = table.find(ip).unwrap_or_else(|| panic!("no row at {ip:#x}"));
        if *rule == UnwindRule::INVALID {
            return None;
        }
        let expect = Dwarf { machine, section, cie, ip }.caller(row);
        let expect = expect.unwrap_or_else(|| panic!("a rule where DWARF has none, at {ip:#x}: {rule:?}"));
        knows_rbx &= compare_callers(&machine.step(rule, ip), expect, &format!("at {ip:#x}: {rule:?}"));
    }
    Some(knows_rbx)
}

fn first_existing(candidates: &[&str]) -> PathBuf {
    let found = candidates.iter().map(PathBuf::from).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("none of {candidates:?} is on this host"))
}

fn libc() -> PathBuf {
    mapped_file("/libc.so.6")
}

/// A file that this test itself has mapped.
fn mapped_file(suffix: &str) -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let path =
        maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.ends_with(suffix));
    path.unwrap_or_else(|| panic!("no {suffix} in {maps}")).into()
}

/// The file a command runs, through links.
fn command(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.exists());
    fs::canonicalize(found.unwrap_or_else(|| panic!("no {name} in PATH"))).unwrap()
}

/// Shared libraries below a directory, links left out.
fn libraries(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => libraries(&path, found),
            Ok(kind) if kind.is_file() && path.to_string_lossy().contains(".so") => found.push(path),
            _ => {}
        }
    }
}

fn report(path: &Path, table: &UnwindTable, seconds: f64) {
    let counts = table.counts();
    let reasons: Vec<_> = Inexpressible::ALL
        .iter()
        .zip(counts.inexpressible_rows)
        .filter(|&(_, rows)| rows > 0)
        .map(|(reason, rows)| format!("{}={rows}", reason.name()))
        .collect();
    eprintln!(
        "{}: {} FDEs ({} dead), {} rows of {} raw, {} rules, {} B, {:.2} B/row, {:.1} ms, inexpressible: {} FDEs, [{}]",
        path.display(),
        counts.fdes,
        counts.dead_fdes,
        counts.rows,
        counts.raw_rows,
        table.rules().len(),
        table.page_bytes(),
        table.page_bytes() as f64 / counts.rows as f64,
        seconds * 1e3,
        counts.inexpressible_fdes,
        reasons.join(" "),
    );
}

#[test]
fn the_step_agrees_with_gimli_on_every_row_of_libc() {
    let compared = compare(&libc());
    assert!(compared.fdes > 1000 && compared.rows > 10_000, "{compared:?}");
    // vfork, setcontext and their like, which do not keep the return address at CFA-8.
    assert!(compared.invalid_rows < 20, "{compared:?}");
    // Realigned frames and those of assembly.
    assert!(compared.rbx_lost_rows * 20 < compared.rows, "{compared:?}");
}

#[test]
fn the_step_agrees_with_gimli_on_every_row_of_the_dynamic_linker() {
    compare(&first_existing(&["/lib64/ld-linux-x86-64.so.2"]));
}

#[test]
fn the_step_agrees_with_gimli_on_every_row_of_this_test() {
    compare(&env::current_exe().unwrap());
}

#[test]
#[ignore = "needs a shared libpython and takes seconds"]
fn the_step_agrees_with_gimli_on_every_row_of_libpython() {
    let mut found = Vec::new();
    for dir in ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib"] {
        libraries(Path::new(dir), &mut found);
    }
    found.retain(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libpython3."))
    });
    // libpython3.so only refers to the library of one version.
    let largest = found.into_iter().max_by_key(|path| fs::metadata(path).map_or(0, |file| file.len()));
    eprintln!("{:?}", compare(&largest.expect("no libpython3 on this host")));
}

#[test]
#[ignore = "needs node and takes seconds"]
fn the_step_agrees_with_gimli_on_every_row_of_node() {
    eprintln!("{:?}", compare(&command("node")));
}

#[test]
#[ignore = "takes seconds"]
fn the_step_agrees_with_gimli_on_every_row_of_librustc_driver() {
    let mut found = Vec::new();
    libraries(&sysroot().join("lib"), &mut found);
    found.retain(|path| path.to_string_lossy().contains("librustc_driver"));
    eprintln!("{:?}", compare(found.first().expect("no librustc_driver in the sysroot")));
}

#[test]
#[ignore = "needs PROFILER_TEST_AARCH64_LIBRARY, the path of an aarch64 library"]
fn the_step_agrees_with_gimli_on_every_row_of_an_aarch64_library() {
    let path = env::var_os("PROFILER_TEST_AARCH64_LIBRARY").expect("the reason above");
    eprintln!("{:?}", compare(Path::new(&path)));
}

/// Prints what the tables of this host cost; fails where a library with `.eh_frame` has no table.
#[test]
#[ignore = "reads every shared library of the host"]
fn every_shared_library_of_the_host_has_a_table() {
    for path in [libc(), command("node")] {
        read_table(&path).inspect(|(table, seconds)| report(&path, table, *seconds));
    }
    let mut found = Vec::new();
    libraries(Path::new("/usr/lib"), &mut found);
    libraries(&sysroot().join("lib"), &mut found);
    let mut total = Total::default();
    let mut rules = RuleSet::new(Architecture::X86_64);
    for path in found {
        let Some((table, seconds)) = read_table(&path) else { continue };
        if table.counts().rows > 500_000 {
            report(&path, &table, seconds);
        }
        total.add(&table, seconds);
        rules.acquire(table.rules()).unwrap();
    }
    eprintln!("{} rules, {total:#.2?}", rules.len());
    eprintln!(
        "{:.2} B/row, {:.1} M raw rows/s",
        total.page_bytes as f64 / total.rows as f64,
        total.raw_rows as f64 / total.seconds / 1e6
    );
    assert!(total.files > 0);
}

#[derive(Debug, Default)]
struct Total {
    files: u64,
    fdes: u64,
    raw_rows: u64,
    rows: u64,
    page_bytes: usize,
    seconds: f64,
    inexpressible_fdes: u64,
    inexpressible_rows: u64,
}

impl Total {
    fn add(&mut self, table: &UnwindTable, seconds: f64) {
        let counts = table.counts();
        self.files += 1;
        self.fdes += counts.fdes;
        self.raw_rows += counts.raw_rows;
        self.rows += counts.rows;
        self.page_bytes += table.page_bytes();
        self.seconds += seconds;
        self.inexpressible_fdes += counts.inexpressible_fdes;
        self.inexpressible_rows += counts.inexpressible_rows_total();
    }
}

/// The table and the seconds it took; `None` for files that are no x86-64 libraries or hold no code of a compiler.
fn read_table(path: &Path) -> Option<(UnwindTable, f64)> {
    let bytes = fs::read(path).ok()?;
    let file = object::File::parse(&*bytes).ok()?;
    let is_library =
        file.kind() == object::ObjectKind::Dynamic || file.kind() == object::ObjectKind::Executable;
    if file.architecture() != object::Architecture::X86_64 || !is_library {
        return None;
    }
    let start = Instant::now();
    match from_elf(&bytes) {
        Ok(table) => Some((table, start.elapsed().as_secs_f64())),
        Err(UnwindError::NoUnwindInformation | UnwindError::NoCode) => None,
        Err(error) => panic!("{}: {error:?}", path.display()),
    }
}

fn sysroot() -> PathBuf {
    let rustc = std::process::Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    PathBuf::from(String::from_utf8(rustc.stdout).unwrap().trim())
}
