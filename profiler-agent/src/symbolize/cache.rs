//! Symbolized locations, remembered within a bound.

use std::collections::{HashMap, HashSet};
use std::mem::size_of;
use std::sync::Arc;

use super::{Frame, Location, LocationId, NewFrame, Reason};
use crate::executable::ExecutableId;

/// What a string costs beside its bytes: reference counts, the allocator's header, its place in the set.
const STRING_BYTES: usize = 48;

/// What a location costs beside its frames: its place in the map, at 7/8 load, and the allocation of the frames.
const LOCATION_BYTES: usize = (size_of::<(LocationId, Remembered)>() + 1) * 8 / 7 + 32;

/// Locations by address, each string kept once.
///
/// When more than `bytes_max` are held, the longest unused eighth goes, then every string that nobody uses any more:
/// a look-up costs one hash and no list. `bytes` is an estimate from sizes.
#[derive(Debug)]
pub(super) struct LocationCache {
    bytes_max: usize,
    bytes: usize,
    clock: u64,
    locations: HashMap<LocationId, Remembered>,
    strings: HashSet<Arc<str>>,
    evictions: u64,
}

#[derive(Debug)]
struct Remembered {
    location: Location,
    used_at: u64,
}

impl LocationCache {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            clock: 0,
            locations: HashMap::new(),
            strings: HashSet::new(),
            evictions: 0,
        }
    }

    pub(super) fn get(&mut self, id: LocationId) -> Option<Location> {
        let remembered = self.locations.get_mut(&id)?;
        self.clock += 1;
        remembered.used_at = self.clock;
        Some(remembered.location.clone())
    }

    pub(super) fn contains(&self, id: LocationId) -> bool {
        self.locations.contains_key(&id)
    }

    pub(super) fn insert(&mut self, id: LocationId, found: Result<Vec<NewFrame>, Reason>) -> Location {
        let location = match found {
            Ok(frames) => {
                Location::Resolved(frames.into_iter().map(|frame| self.intern_frame(frame)).collect())
            }
            Err(reason) => Location::Unresolved(reason),
        };
        self.clock += 1;
        let remembered = Remembered { location: location.clone(), used_at: self.clock };
        self.bytes += location_bytes(&location);
        if let Some(before) = self.locations.insert(id, remembered) {
            self.bytes -= location_bytes(&before.location);
        }
        if self.bytes > self.bytes_max {
            self.evict();
        }
        location
    }

    /// Forgets every kernel location: modules and BPF programs come and go at the same addresses.
    pub(super) fn forget_kernel(&mut self) {
        self.retain(|id, _| !matches!(id, LocationId::Kernel(_)));
    }

    pub(super) fn forget_executable(&mut self, id: ExecutableId) {
        self.retain(
            |location, _| !matches!(location, LocationId::Native(executable, _) if *executable == id),
        );
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.locations.len()
    }

    /// Locations dropped so far to stay within the bound.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    fn evict(&mut self) {
        let mut uses: Vec<u64> = self.locations.values().map(|remembered| remembered.used_at).collect();
        let goes = (uses.len() / 8).max(1).min(uses.len().saturating_sub(1));
        let (_, &mut oldest_to_stay, _) = uses.select_nth_unstable(goes);
        let before = self.locations.len();
        self.retain(|_, remembered| remembered.used_at >= oldest_to_stay);
        self.evictions += (before - self.locations.len()) as u64;
    }

    fn retain(&mut self, keep: impl Fn(&LocationId, &Remembered) -> bool) {
        let mut freed = 0;
        self.locations.retain(|id, remembered| {
            let keep = keep(id, remembered);
            freed += if keep { 0 } else { location_bytes(&remembered.location) };
            keep
        });
        self.strings.retain(|string| {
            let keep = Arc::strong_count(string) > 1;
            freed += if keep { 0 } else { string_bytes(string) };
            keep
        });
        self.bytes -= freed;
    }

    fn intern_frame(&mut self, frame: NewFrame) -> Frame {
        let NewFrame { function, system_name, module, file, line, start_line, module_offset } = frame;
        Frame {
            function: self.intern(&function),
            system_name: self.intern(&system_name),
            module: self.intern(&module),
            file: self.intern(&file),
            line,
            start_line,
            module_offset,
        }
    }

    fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.bytes += string_bytes(&new);
        self.strings.insert(Arc::clone(&new));
        new
    }
}

fn string_bytes(text: &str) -> usize {
    text.len() + STRING_BYTES
}

fn location_bytes(location: &Location) -> usize {
    match location {
        Location::Resolved(frames) => LOCATION_BYTES + frames.len() * size_of::<Frame>(),
        Location::Unresolved(_) => LOCATION_BYTES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr;
    use crate::sys::heap;

    fn id(addr: u64) -> LocationId {
        LocationId::Kernel(Addr(addr))
    }

    fn frames(names: &[&str]) -> Result<Vec<NewFrame>, Reason> {
        Ok(names.iter().map(|&name| NewFrame { function: name.into(), ..NewFrame::default() }).collect())
    }

    #[test]
    fn a_frame_stays_small() {
        assert_eq!(size_of::<Frame>(), 80);
    }

    #[test]
    fn equal_strings_are_kept_once() {
        let mut cache = LocationCache::new(1 << 20);
        let a = cache.insert(id(1), frames(&["same"]));
        let b = cache.insert(id(2), frames(&["same"]));
        let (Location::Resolved(a), Location::Resolved(b)) = (a, b) else { panic!("both have frames") };
        assert!(Arc::ptr_eq(&a[0].function, &b[0].function));
        assert_eq!(cache.strings.len(), 2, "the name and the empty string");
    }

    #[test]
    fn the_longest_unused_go_first_and_the_bound_holds() {
        let mut cache = LocationCache::new(64 << 10);
        cache.insert(id(0), frames(&["used all the time"]));
        for i in 1..2000 {
            cache.insert(id(i), frames(&[&format!("function {i}")]));
            assert!(cache.bytes() <= 64 << 10, "{} bytes after {i}", cache.bytes());
            assert!(cache.get(id(0)).is_some(), "evicted after {i}");
        }
        assert!(cache.contains(id(1999)));
        assert!(!cache.contains(id(1)));
        assert_eq!(cache.evictions() + cache.len() as u64, 2000);
        assert!(cache.strings.len() <= cache.len() + 1, "strings of what was evicted are gone");
    }

    /// The table of the map doubles, so that what is held goes around what is said.
    #[test]
    fn what_is_held_is_about_what_is_said() {
        for locations in [10_000, 14_000, 20_000, 28_000, 29_000, 40_000] {
            let before = heap::held_bytes();
            let mut cache = LocationCache::new(usize::MAX);
            for at in 0..locations {
                let [function, inlined] = [format!("module::function_{at}"), format!("inlined_{}", at % 100)];
                cache.insert(id(at), frames(&[&inlined, &function]));
            }
            let held = (heap::held_bytes() - before) as f64 / cache.bytes() as f64;
            assert!((0.8..1.3).contains(&held), "{locations} locations: {held} of {}", cache.bytes());
        }
    }

    #[test]
    fn bytes_return_to_nothing_when_all_is_forgotten() {
        let mut cache = LocationCache::new(1 << 20);
        for i in 0..100 {
            cache.insert(id(i % 10), frames(&["a", "b", "c"]));
            cache.insert(id(50), Err(Reason::NoSymbols));
        }
        cache.forget_kernel();
        assert_eq!((cache.bytes(), cache.len(), cache.strings.len()), (0, 0, 0));
    }

    #[test]
    fn a_location_larger_than_the_bound_is_still_answered() {
        let mut cache = LocationCache::new(1);
        let location = cache.insert(id(1), frames(&["large"]));
        assert!(matches!(location, Location::Resolved(_)));
        cache.insert(id(2), frames(&["next"]));
        assert_eq!(cache.len(), 1);
    }
}
