//! Credits: a bag of permits.

use kvferry_core::protocol::{Credit, CreditError};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Take(u64),
    Force(u64),
    Give(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        (0..12_u64).prop_map(Operation::Take),
        (0..12_u64).prop_map(Operation::Force),
        (0..12_u64).prop_map(Operation::Give),
    ]
}

proptest! {
    #[test]
    fn permits_are_neither_made_nor_lost(
        limit in 0..20_u64,
        operations in prop::collection::vec(operation(), 1..100),
    ) {
        let mut credit = Credit::new(limit);
        // The model: one entry for every permit that is out.
        let mut out: Vec<()> = Vec::new();
        for operation in operations {
            match operation {
                Operation::Take(wanted) => {
                    let left = (out.len() as u64..limit).count() as u64;
                    let expected = if wanted <= left { Ok(()) } else { Err(CreditError { wanted, left, limit }) };
                    prop_assert_eq!(credit.take(wanted), expected);
                    if expected.is_ok() {
                        out.extend((0..wanted).map(|_| ()));
                    }
                }
                Operation::Force(used) => {
                    credit.force(used);
                    out.extend((0..used).map(|_| ()));
                }
                // Giving back more than is out is a mistake of the caller, which a debug build refuses.
                Operation::Give(returned) => {
                    let returned = returned.min(out.len() as u64);
                    credit.give(returned);
                    out.truncate(out.len() - returned as usize);
                }
            }
            prop_assert_eq!(credit.used(), out.len() as u64);
            prop_assert_eq!(credit.left(), (out.len() as u64..limit).count() as u64);
            prop_assert_eq!(credit.limit(), limit);
        }
    }
}
