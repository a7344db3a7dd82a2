//! Rules shared by all tables of a host.

use std::collections::HashMap;

use profiler_common::unwind::{Leaf, UnwindRule};

use crate::elf::Architecture;
use crate::{limits, rule};

/// Numbers of rules, as the kernel's rule map has them.
///
/// A rule is numbered when the first table needs it, and its number is free again some time after the last one went:
/// [`RuleSet::release`] hands out the numbers that no table uses any more, and only [`RuleSet::recycle`] makes them
/// free. In between the caller waits until no program in flight can hold them.
#[derive(Debug)]
pub struct RuleSet {
    ids: HashMap<UnwindRule, u16>,
    slots: Vec<Slot>,
    free: Vec<u16>,
}

#[derive(Debug)]
struct Slot {
    rule: UnwindRule,
    /// Tables that hold the number, one more for the fixed rules.
    users: u32,
    /// Times the number was handed out as unused and has not been recycled since.
    waiting: u32,
}

/// There are more distinct rules than the kernel's rule map holds.
#[derive(Debug, thiserror::Error)]
#[error("more than {max} distinct unwind rules on this host")]
pub struct RuleSetFull {
    /// [`limits::RULES_MAX`].
    pub max: usize,
}

/// The numbers of one table's rules, in the order of [`crate::UnwindTable::rules`].
#[derive(Debug)]
pub struct RuleIds(Vec<u16>);

impl RuleIds {
    /// The numbers.
    #[must_use]
    pub fn as_slice(&self) -> &[u16] {
        &self.0
    }

    /// A leaf of the table with the host's numbers in place of the table's.
    #[must_use]
    pub fn renumber(&self, leaf: &Leaf) -> Leaf {
        let id = |local: u16| self.0.get(usize::from(local)).copied().unwrap_or(RuleSet::INVALID);
        Leaf { offsets: leaf.offsets, rules: leaf.rules.map(id) }
    }
}

impl RuleSet {
    /// Number of [`UnwindRule::INVALID`].
    pub const INVALID: u16 = 0;
    /// Number of [`UnwindRule::GAP`].
    pub const GAP: u16 = 1;
    /// Number of the architecture's frame-pointer rule.
    pub const FRAME_POINTER: u16 = 2;

    /// A set with the three rules of fixed number, which stay.
    #[must_use]
    pub fn new(architecture: Architecture) -> Self {
        let fixed = [UnwindRule::INVALID, UnwindRule::GAP, rule::frame_pointer(architecture)];
        let slots = fixed.iter().map(|&rule| Slot { rule, users: 1, waiting: 0 }).collect();
        let ids = fixed.iter().zip(0..).map(|(&rule, id)| (rule, id)).collect();
        Self { ids, slots, free: Vec::new() }
    }

    /// Numbers the rules of a table. All of them are to be in the kernel's map before the table's leaves are.
    ///
    /// # Errors
    ///
    /// Where the set is full; it is then as before.
    pub fn acquire(&mut self, rules: &[UnwindRule]) -> Result<RuleIds, RuleSetFull> {
        let mut ids = RuleIds(Vec::with_capacity(rules.len()));
        for &rule in rules {
            let Some(id) = self.acquire_one(rule) else {
                let unused = self.release(ids);
                self.recycle(unused);
                return Err(RuleSetFull { max: limits::RULES_MAX });
            };
            ids.0.push(id);
        }
        Ok(ids)
    }

    /// Gives up the numbers of a table; returns those that no table uses any more.
    #[must_use = "the numbers are lost unless they are recycled"]
    pub fn release(&mut self, ids: RuleIds) -> Vec<u16> {
        ids.0.into_iter().filter(|&id| self.release_one(id)).collect()
    }

    /// Makes numbers free that [`RuleSet::release`] returned, except those in use again, or returned again, since.
    /// Each list it returned is to be recycled once.
    pub fn recycle(&mut self, unused: Vec<u16>) {
        for id in unused {
            let Some(slot) = self.slots.get_mut(usize::from(id)) else { continue };
            slot.waiting -= 1;
            if slot.users == 0 && slot.waiting == 0 {
                self.ids.remove(&slot.rule);
                self.free.push(id);
            }
        }
    }

    /// The rule with a number, `None` for one that is not in use.
    #[must_use]
    pub fn rule(&self, id: u16) -> Option<UnwindRule> {
        self.slots.get(usize::from(id)).filter(|slot| slot.users > 0).map(|slot| slot.rule)
    }

    /// Rules that have a number, those that wait for [`RuleSet::recycle`] included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Never: the fixed rules stay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    fn acquire_one(&mut self, rule: UnwindRule) -> Option<u16> {
        let id = match self.ids.get(&rule) {
            Some(&id) => id,
            None => self.new_slot(rule)?,
        };
        self.slots.get_mut(usize::from(id))?.users += 1;
        Some(id)
    }

    fn new_slot(&mut self, rule: UnwindRule) -> Option<u16> {
        let slot = Slot { rule, users: 0, waiting: 0 };
        let id = match self.free.pop() {
            Some(id) => {
                *self.slots.get_mut(usize::from(id))? = slot;
                id
            }
            None if self.slots.len() < limits::RULES_MAX => {
                self.slots.push(slot);
                u16::try_from(self.slots.len() - 1).ok()?
            }
            None => return None,
        };
        self.ids.insert(rule, id);
        Some(id)
    }

    /// Whether that was the last user.
    fn release_one(&mut self, id: u16) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(id)) else { return false };
        slot.users -= 1;
        let unused = slot.users == 0;
        slot.waiting += u32::from(unused);
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(cfa_offset: i32) -> UnwindRule {
        UnwindRule { cfa_offset, ..rule::frame_pointer(Architecture::X86_64) }
    }

    fn set() -> RuleSet {
        RuleSet::new(Architecture::X86_64)
    }

    #[test]
    fn equal_rules_of_two_tables_share_a_number() {
        let mut set = set();
        let first = set.acquire(&[UnwindRule::GAP, rule(8), rule(16)]).unwrap();
        let second = set.acquire(&[rule(24), rule(8)]).unwrap();
        assert_eq!(first.as_slice(), [RuleSet::GAP, 3, RuleSet::FRAME_POINTER]);
        assert_eq!(second.as_slice(), [4, 3]);
    }

    #[test]
    fn a_number_is_free_only_after_its_last_table_and_the_recycling() {
        let mut set = set();
        let first = set.acquire(&[rule(8), rule(24)]).unwrap();
        let second = set.acquire(&[rule(8)]).unwrap();
        assert_eq!(set.release(first), [4]);
        assert_eq!(set.acquire(&[rule(32)]).unwrap().as_slice(), [5]);
        assert_eq!(set.release(second), [3]);
        set.recycle(vec![3]);
        assert_eq!(set.acquire(&[rule(40)]).unwrap().as_slice(), [3]);
        assert_eq!(set.rule(3), Some(rule(40)));
        assert_eq!(set.rule(4), None);
    }

    #[test]
    fn a_number_taken_again_while_it_waits_is_not_recycled() {
        let mut set = set();
        let first = set.acquire(&[rule(8)]).unwrap();
        let unused = set.release(first);
        let second = set.acquire(&[rule(8)]).unwrap();
        set.recycle(unused);
        assert_eq!(set.rule(second.as_slice()[0]), Some(rule(8)));
        assert_eq!(set.acquire(&[rule(24)]).unwrap().as_slice(), [4]);
    }

    #[test]
    fn a_number_given_up_twice_is_free_after_both_waits() {
        let mut set = set();
        let first = set.acquire(&[rule(8)]).unwrap();
        let earlier = set.release(first);
        let second = set.acquire(&[rule(8)]).unwrap();
        let later = set.release(second);
        set.recycle(earlier);
        assert_eq!(set.acquire(&[rule(24)]).unwrap().as_slice(), [4]);
        set.recycle(later);
        assert_eq!(set.acquire(&[rule(32)]).unwrap().as_slice(), [3]);
    }

    #[test]
    fn a_full_set_refuses_a_table_and_stays_as_it_was() {
        let mut set = set();
        let many: Vec<_> = (100..100 + limits::RULES_MAX as i32 - 3).map(rule).collect();
        let ids = set.acquire(&many).unwrap();
        assert!(set.acquire(&[rule(100), rule(1)]).is_err());
        assert_eq!(set.len(), limits::RULES_MAX);
        let unused = set.release(ids);
        assert_eq!(unused.len(), many.len());
        set.recycle(unused);
        assert_eq!(set.len(), 3);
    }
}
