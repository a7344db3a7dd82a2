//! Stacks with values, merged into a call tree, and the tree as the rows a flame graph is drawn from.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use profiler_pprof::FrameKind;
use serde::Serialize;

use crate::{
    model::ContentId,
    stack::{Frame, FrameParts, Stack},
};

/// Name of the node that stands for those left out.
const OTHER: &str = "[other]";

/// A call tree; node 0 is the root.
pub(crate) struct Tree {
    names: NameTable,
    nodes: Vec<Node>,
    children: HashMap<(u32, u32), u32>,
    /// Frames already named: a frame occurs in many stacks.
    frame_names: HashMap<ContentId, u32>,
}

struct Node {
    name: u32,
    parent: u32,
    total: i64,
    itself: i64,
}

/// Distinct (name, kind, file) triples, in order of first use.
#[derive(Default)]
struct NameTable {
    names: Vec<Name>,
    index: HashMap<Name, u32>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Name {
    text: Arc<str>,
    kind: FrameKind,
    file: Arc<str>,
}

impl NameTable {
    fn intern(&mut self, name: Name) -> u32 {
        if let Some(&index) = self.index.get(&name) {
            return index;
        }
        let index = self.names.len() as u32;
        self.names.push(name.clone());
        self.index.insert(name, index);
        index
    }
}

/// The tree as the UI draws it.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Rows {
    pub(crate) total: i64,
    pub(crate) names: Vec<Arc<str>>,
    /// `FrameKind` on the wire, one per name.
    pub(crate) kinds: Vec<u32>,
    /// `file:start_line`, or the binary, or `""`; one per name.
    pub(crate) files: Vec<Arc<str>>,
    /// `level, total, self, name` repeated, in pre-order, largest child first; the root is level 0, name 0.
    pub(crate) rows: Vec<i64>,
    /// Nodes folded into `[other]`.
    pub(crate) truncated_nodes: usize,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let mut names = NameTable::default();
        let root = names.intern(Name::synthetic("total"));
        let nodes = vec![Node { name: root, parent: 0, total: 0, itself: 0 }];
        Self { names, nodes, children: HashMap::new(), frame_names: HashMap::new() }
    }

    /// Adds a stack under the root, or under a first-level node named `group`.
    pub(crate) fn add(&mut self, group: Option<&str>, stack: &Stack, value: i64) {
        let mut node = 0;
        self.nodes[0].total = self.nodes[0].total.saturating_add(value);
        if let Some(group) = group {
            let name = self.names.intern(Name::synthetic(group));
            node = self.child(node, name, value);
        }
        for frame in stack.frames.iter().rev() {
            let name = self.frame_name(frame);
            node = self.child(node, name, value);
        }
        let itself = &mut self.nodes[node as usize].itself;
        *itself = itself.saturating_add(value);
    }

    fn child(&mut self, parent: u32, name: u32, value: i64) -> u32 {
        let next = self.nodes.len() as u32;
        let node = *self.children.entry((parent, name)).or_insert(next);
        if node == next {
            self.nodes.push(Node { name, parent, total: 0, itself: 0 });
        }
        let total = &mut self.nodes[node as usize].total;
        *total = total.saturating_add(value);
        node
    }

    fn frame_name(&mut self, frame: &Frame) -> u32 {
        if let Some(&name) = self.frame_names.get(&frame.id) {
            return name;
        }
        let name = self.names.intern(Name::of_frame(&frame.parts));
        self.frame_names.insert(frame.id, name);
        name
    }

    /// The tree as rows, at most `nodes_max` of them and one `[other]` for each of these that lost children.
    pub(crate) fn rows(self, nodes_max: usize) -> Rows {
        let kept = self.heaviest(nodes_max.max(1));
        Layout::new(self, kept).rows()
    }

    /// The `nodes_max` heaviest nodes. A parent is at least as heavy as its children and comes first, so what is
    /// kept is again a tree.
    fn heaviest(&self, nodes_max: usize) -> HashSet<u32> {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for (index, node) in self.nodes.iter().enumerate().skip(1) {
            children.entry(node.parent).or_default().push(index as u32);
        }
        let weight = |node: u32| (self.nodes[node as usize].total.unsigned_abs(), Reverse(node));
        let mut kept = HashSet::new();
        let mut candidates = BinaryHeap::from([weight(0)]);
        while let Some((_, Reverse(node))) = candidates.pop() {
            kept.insert(node);
            if kept.len() == nodes_max {
                break;
            }
            candidates.extend(children.get(&node).into_iter().flatten().map(|&child| weight(child)));
        }
        kept
    }
}

/// A tree on its way to rows: the kept nodes, and what was folded under each.
struct Layout {
    tree: Tree,
    children: HashMap<u32, Vec<u32>>,
    /// Value of the left-out children of a kept node.
    folded: HashMap<u32, i64>,
    other: Option<u32>,
    truncated_nodes: usize,
}

impl Layout {
    fn new(mut tree: Tree, kept: HashSet<u32>) -> Self {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        let mut folded: HashMap<u32, i64> = HashMap::new();
        for (index, node) in tree.nodes.iter().enumerate().skip(1) {
            if kept.contains(&(index as u32)) {
                children.entry(node.parent).or_default().push(index as u32);
            } else if kept.contains(&node.parent) {
                let value = folded.entry(node.parent).or_default();
                *value = value.saturating_add(node.total);
            }
        }
        let truncated_nodes = tree.nodes.len() - kept.len();
        let other = (truncated_nodes > 0).then(|| tree.names.intern(Name::synthetic(OTHER)));
        Self { tree, children, folded, other, truncated_nodes }
    }

    fn rows(self) -> Rows {
        let mut rows = Vec::new();
        let mut used = UsedNames::default();
        let mut stack = vec![Row { level: 0, total: self.tree.nodes[0].total, entry: Entry::Node(0) }];
        while let Some(Row { level, total, entry }) = stack.pop() {
            match entry {
                Entry::Other(name) => rows.extend([level, total, total, used.number(name)]),
                Entry::Node(node) => {
                    let Node { name, itself, .. } = &self.tree.nodes[node as usize];
                    rows.extend([level, total, *itself, used.number(*name)]);
                    let mut below = self.below(node, level + 1);
                    // The stack gives the last one first.
                    below.sort_by_key(|row| (row.total, Reverse(row.order())));
                    stack.append(&mut below);
                }
            }
        }
        let names = || used.order.iter().map(|&name| &self.tree.names.names[name as usize]);
        Rows {
            total: self.tree.nodes[0].total,
            names: names().map(|name| Arc::clone(&name.text)).collect(),
            kinds: names().map(|name| name.kind.to_wire()).collect(),
            files: names().map(|name| Arc::clone(&name.file)).collect(),
            rows,
            truncated_nodes: self.truncated_nodes,
        }
    }

    fn below(&self, node: u32, level: i64) -> Vec<Row> {
        let kept = self.children.get(&node).into_iter().flatten();
        let mut below: Vec<Row> = kept
            .map(|&child| Row {
                level,
                total: self.tree.nodes[child as usize].total,
                entry: Entry::Node(child),
            })
            .collect();
        if let (Some(&total), Some(name)) = (self.folded.get(&node), self.other) {
            below.push(Row { level, total, entry: Entry::Other(name) });
        }
        below
    }
}

/// Renumbers names by first use in the rows: those of folded nodes are not sent.
#[derive(Default)]
struct UsedNames {
    order: Vec<u32>,
    numbers: HashMap<u32, i64>,
}

impl UsedNames {
    fn number(&mut self, name: u32) -> i64 {
        *self.numbers.entry(name).or_insert_with(|| {
            self.order.push(name);
            self.order.len() as i64 - 1
        })
    }
}

struct Row {
    level: i64,
    total: i64,
    entry: Entry,
}

enum Entry {
    Node(u32),
    /// With the index of its name.
    Other(u32),
}

impl Row {
    /// Breaks ties: older nodes first, `[other]` last.
    fn order(&self) -> u32 {
        match self.entry {
            Entry::Node(node) => node,
            Entry::Other(_) => u32::MAX,
        }
    }
}

impl Name {
    fn synthetic(text: &str) -> Self {
        Self { text: text.into(), kind: FrameKind::Unspecified, file: "".into() }
    }

    fn of_frame(frame: &FrameParts) -> Self {
        let text = match &*frame.function {
            "" => unnamed(frame).into(),
            _ => Arc::clone(&frame.function),
        };
        let file = match (&*frame.file, frame.start_line) {
            ("", _) => Arc::clone(&frame.binary),
            (_, ..=0) => Arc::clone(&frame.file),
            (file, line) => format!("{file}:{line}").into(),
        };
        Self { text, kind: frame.kind, file }
    }
}

/// `app+0x1234`, or the bare address of code outside any file.
pub(crate) fn unnamed(frame: &FrameParts) -> String {
    match Path::new(&*frame.binary).file_name().and_then(|name| name.to_str()) {
        Some(binary) => format!("{binary}+{:#x}", frame.address),
        None => format!("{:#x}", frame.address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::{StackCache, tests::native};

    /// A tree of stacks written root first: `main;work 3`.
    fn tree(lines: &[&str]) -> Tree {
        let cache = StackCache::new(1 << 20);
        let mut tree = Tree::new();
        for line in lines {
            let (stack, value) = line.rsplit_once(' ').expect("stack and value");
            let frames = stack.split(';').rev().map(|name| cache.frame(native(name))).collect();
            tree.add(None, &cache.stack(frames), value.parse().expect("a number"));
        }
        tree
    }

    #[track_caller]
    fn check(lines: &[&str], nodes_max: usize, expect: &[(i64, i64, i64, &str)]) {
        let rows = tree(lines).rows(nodes_max);
        let found: Vec<_> = rows
            .rows
            .chunks_exact(4)
            .map(|row| (row[0], row[1], row[2], &*rows.names[row[3] as usize]))
            .collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn rows_are_in_pre_order_with_the_largest_child_first() {
        check(
            &["main;small 1", "main;large 5", "main;large;leaf 2", "other_thread 3"],
            100,
            &[
                (0, 11, 0, "total"),
                (1, 8, 0, "main"),
                (2, 7, 5, "large"),
                (3, 2, 2, "leaf"),
                (2, 1, 1, "small"),
                (1, 3, 3, "other_thread"),
            ],
        );
    }

    #[test]
    fn light_nodes_are_folded_and_no_value_is_lost() {
        check(
            &["main;a 10", "main;b;c 2", "main;d 1", "e 1"],
            3,
            &[(0, 14, 0, "total"), (1, 13, 0, "main"), (2, 10, 10, "a"), (2, 3, 3, OTHER), (1, 1, 1, OTHER)],
        );
        assert_eq!(tree(&["main;a 10", "main;b;c 2", "main;d 1", "e 1"]).rows(3).truncated_nodes, 4);
    }

    #[test]
    fn an_empty_tree_is_one_root() {
        check(&[], 10, &[(0, 0, 0, "total")]);
    }

    #[test]
    fn recursion_nests() {
        check(&["f;f;f 1", "f 1"], 10, &[(0, 2, 0, "total"), (1, 2, 1, "f"), (2, 1, 0, "f"), (3, 1, 1, "f")]);
    }

    #[test]
    fn functions_of_one_name_in_two_files_stay_apart() {
        let cache = StackCache::new(1 << 20);
        let mut tree = Tree::new();
        for file in ["a.c", "b.c"] {
            let frame = cache.frame(FrameParts { file: file.into(), ..native("main") });
            tree.add(None, &cache.stack(vec![frame]), 1);
        }
        let rows = tree.rows(10);
        assert_eq!(rows.rows.len(), 3 * 4);
        assert_eq!(rows.files.iter().map(|file| &**file).collect::<Vec<_>>(), ["", "a.c:1", "b.c:1"]);
    }

    #[test]
    fn a_frame_without_a_name_shows_its_binary_and_address() {
        let mut frame = native("");
        assert_eq!(unnamed(&frame), "app+0x10");
        frame.binary = "".into();
        assert_eq!(unnamed(&frame), "0x10");
        frame.binary = "[kernel.kallsyms]".into();
        assert_eq!(unnamed(&frame), "[kernel.kallsyms]+0x10");
    }
}
