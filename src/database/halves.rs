//! Finding what is refused among many: all as one, and what was refused in parts, in order.

use std::ops::Range;

/// Items still to be tried, the next ones last.
#[derive(Debug)]
pub struct Halves {
    waiting: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    items: Range<usize>,
    /// The half behind it comes next.
    is_first: bool,
    /// A larger part was refused, and the rest of it went in.
    must_have_it: bool,
}

impl Part {
    fn untried(items: Range<usize>) -> Part {
        Part { items, is_first: false, must_have_it: false }
    }
}

impl Halves {
    /// Of parts that follow each other.
    pub fn of(parts: impl IntoIterator<Item = Range<usize>>) -> Halves {
        let mut waiting: Vec<Part> = parts.into_iter().map(Part::untried).collect();
        waiting.reverse();
        Halves { waiting }
    }

    /// Of items that were refused as one.
    pub fn of_refused(items: Range<usize>) -> Halves {
        Halves { waiting: vec![Part { must_have_it: true, ..Part::untried(items) }] }
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The part that is left, when it is the only one.
    pub fn only(&self) -> Option<Range<usize>> {
        let [part] = self.waiting.as_slice() else { return None };
        Some(part.items.clone())
    }

    /// What to try. A part that must have the refused one is not tried as a whole.
    pub fn next(&mut self) -> Option<Range<usize>> {
        while self.waiting.last()?.must_have_it && self.split() {}
        self.waiting.last().map(|part| part.items.clone())
    }

    /// The next one went in.
    pub fn taken(&mut self) {
        let was_first = self.waiting.pop().is_some_and(|part| part.is_first);
        if let Some(second) = self.waiting.last_mut().filter(|_| was_first) {
            second.must_have_it = true;
        }
    }

    /// Two halves instead of the next one. False when it is no more than one item.
    pub fn split(&mut self) -> bool {
        let Some(Part { items, .. }) = self.waiting.pop_if(|part| part.items.len() > 1) else {
            return false;
        };
        let middle = items.start + items.len() / 2;
        self.waiting.push(Part::untried(middle..items.end));
        self.waiting.push(Part { is_first: true, ..Part::untried(items.start..middle) });
        true
    }

    /// Instead of the next one what is before this item of it, the item alone, and the rest.
    pub fn split_around(&mut self, item: usize) {
        let Some(Part { items, .. }) = self.waiting.pop() else { return };
        let parts = [items.start..item, item..item + 1, item + 1..items.end];
        self.put_back(parts.into_iter().filter(|part| !part.is_empty()));
    }

    /// The next one is done with, whatever became of it.
    pub fn passed(&mut self) {
        self.waiting.pop();
    }

    /// Others before what is left, of which nothing is known then.
    pub fn put_back(&mut self, parts: impl DoubleEndedIterator<Item = Range<usize>>) {
        if let Some(next) = self.waiting.last_mut() {
            next.must_have_it = false;
        }
        self.waiting.extend(parts.rev().map(Part::untried));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The refused ones as they are found, and how many parts were tried.
    fn find(items: Range<usize>, bad: &[usize]) -> (Vec<usize>, usize) {
        let (mut halves, mut found, mut tries) = (Halves::of_refused(items.clone()), vec![], 0);
        let mut next = items.start;
        while let Some(part) = halves.next() {
            tries += 1;
            if !bad.iter().any(|item| part.contains(item)) {
                assert_eq!(part.start, next, "in order");
                next = part.end;
                halves.taken();
                continue;
            }
            if !halves.split() {
                found.push(part.start);
                next = part.end;
                halves.passed();
            }
        }
        assert_eq!(next, items.end);
        (found, tries)
    }

    #[test]
    fn one_of_a_thousand_is_found_in_log2_tries_and_some() {
        for bad in [0, 1, 499, 500, 511, 998, 999] {
            let (found, tries) = find(0..1_000, &[bad]);
            assert_eq!(found, [bad]);
            assert!(tries <= 20, "{bad}: {tries}");
        }
        assert_eq!(find(7..8, &[7]), (vec![7], 1));
        assert!(find(0..1_000, &[999]).1 <= 11);
    }

    proptest! {
        #[test]
        fn all_are_found_and_the_others_are_taken_in_order(
            count in 1usize..200,
            bad in prop::collection::btree_set(0usize..200, 0..20),
        ) {
            let bad: Vec<usize> = bad.into_iter().filter(|bad| *bad < count).collect();
            prop_assert_eq!(find(0..count, &bad).0, bad);
        }
    }
}
