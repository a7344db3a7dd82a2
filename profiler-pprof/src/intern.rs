//! Content to index: every distinct content once, numbered in the order it was first seen.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// Numbers contents from 0. Contents are compared in full; the hash only finds the bucket.
#[derive(Debug)]
pub(crate) struct Interner<K> {
    indices: HashMap<K, usize>,
}

impl<K> Default for Interner<K> {
    fn default() -> Self {
        Self { indices: HashMap::new() }
    }
}

impl<K: Hash + Eq> Interner<K> {
    /// The index of `content`; it is copied only when it is new.
    pub(crate) fn intern<Q>(&mut self, content: &Q) -> usize
    where
        K: Borrow<Q> + From<Q::Owned>,
        Q: Hash + Eq + ToOwned + ?Sized,
    {
        if let Some(&index) = self.indices.get(content) {
            return index;
        }
        let index = self.indices.len();
        self.indices.insert(content.to_owned().into(), index);
        index
    }

    pub(crate) fn len(&self) -> usize {
        self.indices.len()
    }

    /// The contents; each one's position is its index.
    pub(crate) fn into_ordered(self) -> Vec<K> {
        let mut entries: Vec<(K, usize)> = self.indices.into_iter().collect();
        entries.sort_unstable_by_key(|&(_, index)| index);
        entries.into_iter().map(|(content, _)| content).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_share_an_index_and_order_is_first_seen() {
        let mut interner = Interner::<Box<str>>::default();
        let indices: Vec<usize> = ["b", "a", "b", "c"].map(|s| interner.intern(s)).to_vec();
        assert_eq!(indices, [0, 1, 0, 2]);
        assert_eq!(interner.len(), 3);
        assert_eq!(interner.into_ordered(), ["b", "a", "c"].map(Box::from));
    }
}
