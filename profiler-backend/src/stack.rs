//! Frames and stacks by content, and the bounded cache that shares them between profiles, parts and queries.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use profiler_pprof::FrameKind;

use crate::model::{ContentHash, ContentId};

/// One call of a stack. An inlined call is a frame of its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Hash of [`FrameParts`].
    pub(crate) id: ContentId,
    pub(crate) parts: FrameParts,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FrameParts {
    pub(crate) kind: FrameKind,
    /// The next frame of the stack, its caller, has the same address: this call was inlined into it.
    pub(crate) inlined: bool,
    /// Name for people; `""` when no symbol was found.
    pub(crate) function: Arc<str>,
    /// Name as the linker knows it.
    pub(crate) system_name: Arc<str>,
    pub(crate) file: Arc<str>,
    /// Line the function starts at; 0 when not known.
    pub(crate) start_line: i64,
    pub(crate) line: i64,
    pub(crate) column: i64,
    /// Byte in `binary` when the profile's mapping tells, else the address as it was pushed. Where a process maps
    /// its binaries must not make its stacks differ from those of the next one.
    pub(crate) address: u64,
    /// File of the mapping, `""` without one.
    pub(crate) binary: Arc<str>,
    pub(crate) build_id: Arc<str>,
}

impl FrameParts {
    fn id(&self) -> ContentId {
        let Self {
            kind,
            inlined,
            function,
            system_name,
            file,
            start_line,
            line,
            column,
            address,
            binary,
            build_id,
        } = self;
        let mut hash = ContentHash::default();
        hash.number(kind.to_wire().into()).number((*inlined).into());
        hash.text(function).text(system_name).text(file);
        hash.number(start_line.cast_unsigned()).number(line.cast_unsigned()).number(column.cast_unsigned());
        hash.number(*address).text(binary).text(build_id);
        hash.finish()
    }
}

/// A call stack, leaf first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stack {
    /// Hash of the frames' ids, in order.
    pub(crate) id: ContentId,
    pub(crate) frames: Box<[Arc<Frame>]>,
}

impl Stack {
    fn new(frames: Vec<Arc<Frame>>) -> Self {
        let mut hash = ContentHash::default();
        for frame in &frames {
            hash.id(&frame.id);
        }
        Self { id: hash.finish(), frames: frames.into_boxed_slice() }
    }
}

/// Shares equal frames and stacks. Whoever holds an `Arc` keeps it, so that emptying the cache is always right.
#[derive(Debug)]
pub(crate) struct StackCache {
    tables: Mutex<Tables>,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Tables {
    frames: HashMap<ContentId, Arc<Frame>>,
    stacks: HashMap<ContentId, Arc<Stack>>,
    bytes: usize,
}

impl StackCache {
    /// A cache that starts over when its entries pass `bytes_max`.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { tables: Mutex::default(), bytes_max }
    }

    pub(crate) fn frame(&self, parts: FrameParts) -> Arc<Frame> {
        let id = parts.id();
        let mut tables = self.lock();
        if let Some(frame) = tables.frames.get(&id) {
            return Arc::clone(frame);
        }
        let bytes = 160 + parts.function.len() + parts.system_name.len() + parts.file.len();
        let frame = Arc::new(Frame { id, parts });
        tables.make_room(bytes, self.bytes_max);
        tables.frames.insert(id, Arc::clone(&frame));
        frame
    }

    /// The stack of these frames, leaf first.
    pub(crate) fn stack(&self, frames: Vec<Arc<Frame>>) -> Arc<Stack> {
        let stack = Stack::new(frames);
        let mut tables = self.lock();
        if let Some(known) = tables.stacks.get(&stack.id) {
            return Arc::clone(known);
        }
        let stack = Arc::new(stack);
        tables.make_room(96 + 8 * stack.frames.len(), self.bytes_max);
        tables.stacks.insert(stack.id, Arc::clone(&stack));
        stack
    }

    pub(crate) fn known_stack(&self, id: &ContentId) -> Option<Arc<Stack>> {
        self.lock().stacks.get(id).cloned()
    }

    /// About how much memory the cached entries take, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        // Every update leaves the tables whole: a panic elsewhere while they were locked does no harm.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn make_room(&mut self, bytes: usize, bytes_max: usize) {
        if self.bytes + bytes > bytes_max {
            *self = Self::default();
        }
        self.bytes += bytes;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn native(function: &str) -> FrameParts {
        FrameParts {
            kind: FrameKind::Native,
            inlined: false,
            function: function.into(),
            system_name: function.into(),
            file: "main.c".into(),
            start_line: 1,
            line: 2,
            column: 0,
            address: 0x10,
            binary: "/bin/app".into(),
            build_id: "".into(),
        }
    }

    #[test]
    fn equal_content_is_shared() {
        let cache = StackCache::new(1 << 20);
        let (first, second) = (cache.frame(native("a")), cache.frame(native("a")));
        assert!(Arc::ptr_eq(&first, &second));
        let stack = cache.stack(vec![first.clone()]);
        assert!(Arc::ptr_eq(&stack, &cache.stack(vec![second])));
        assert!(cache.known_stack(&stack.id).is_some());
    }

    #[test]
    fn every_part_of_a_frame_changes_its_id() {
        let base = native("a");
        let changes: [fn(&mut FrameParts); 11] = [
            |f| f.kind = FrameKind::Go,
            |f| f.inlined = true,
            |f| f.function = "b".into(),
            |f| f.system_name = "b".into(),
            |f| f.file = "b".into(),
            |f| f.start_line = 9,
            |f| f.line = 9,
            |f| f.column = 9,
            |f| f.address = 9,
            |f| f.binary = "b".into(),
            |f| f.build_id = "b".into(),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = base.clone();
            change(&mut changed);
            assert_ne!(changed.id(), base.id(), "change {index}");
        }
    }

    #[test]
    fn the_cache_stays_within_its_bound() {
        let cache = StackCache::new(4096);
        for number in 0..1000 {
            let frame = cache.frame(native(&number.to_string()));
            cache.stack(vec![frame]);
            assert!(cache.bytes() <= 4096);
        }
    }
}
