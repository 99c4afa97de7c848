//! What a test needs and the machine lacks.

/// Says that a test is skipped because `what` is not here, for `reason`; fails it where `KVFERRY_REQUIRE`, a list with commas, names `what`.
pub fn absent(what: &str, reason: &str) {
    let list = std::env::var("KVFERRY_REQUIRE").unwrap_or_default();
    assert!(!requires(&list, what), "KVFERRY_REQUIRE asks for {what}: {reason}");
    println!("skipped: {reason}");
}

fn requires(list: &str, what: &str) -> bool {
    list.split(',').any(|word| word.trim() == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_are_required() {
        assert!(requires("ucx, c++", "c++") && requires("ucx,c++", "ucx"));
        assert!(!requires("", "ucx") && !requires("ucx2", "ucx"));
    }
}
