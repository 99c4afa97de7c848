//! Random kills, stops and pauses of ranks and of the scheduler, at random moments, on random clusters of real processes.
//!
//! Every run must end by itself, with nothing mismatched, every request accounted for, nothing held, leaked or quarantined by survivors,
//! every group whole that can be, no descriptor and no mapping more than before, and no process left. `KVFERRY_FAULT_RUNS` says how many
//! runs there are, `KVFERRY_FAULT_SEED` which, `KVFERRY_FAULT_JOBS` how many at once, `KVFERRY_FAULT_ONLY` that only one of them runs;
//! `KVFERRY_CLUSTER` is the example's path where it is not beside this test.

#[allow(dead_code, reason = "other tests use the rest")]
mod cluster;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use cluster::{Ran, run_now};

const RUNS: u64 = 30;
/// Runs mostly wait for silence to be noticed.
const JOBS: u64 = 3;

#[test]
fn every_run_ends_and_nothing_is_left() {
    let (runs, seed) = (variable("RUNS").unwrap_or(RUNS), variable("SEED").unwrap_or(1));
    let only = variable("ONLY");
    let (next, asked, happened) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (requests, delivered) = (AtomicU64::new(0), AtomicU64::new(0));
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..variable("JOBS").unwrap_or(JOBS).max(1) {
            scope.spawn(|| {
                loop {
                    let run = next.fetch_add(1, Ordering::Relaxed);
                    if run >= runs {
                        return;
                    }
                    if only.is_some_and(|only| only != run) {
                        continue;
                    }
                    let plan = Plan::draw(&mut Random(mix(mix(seed) ^ run)));
                    let began = Instant::now();
                    let checked = catch_unwind(AssertUnwindSafe(|| {
                        let ran = run_now(&plan.options());
                        plan.check(&ran);
                        ran
                    }));
                    match checked {
                        Ok(ran) => {
                            asked.fetch_add(plan.faults, Ordering::Relaxed);
                            happened.fetch_add(plan.faults - not_happened(&ran), Ordering::Relaxed);
                            requests.fetch_add(ran.number("requests"), Ordering::Relaxed);
                            delivered.fetch_add(ran.number("delivered"), Ordering::Relaxed);
                        }
                        Err(why) => {
                            let why = why.downcast_ref::<String>().map_or("it panicked", String::as_str);
                            let command = plan.options().join(" ");
                            let failure = format!(
                                "run {run} of seed {seed}, after {:.1} s: {why}\nreproduce it with: cargo build --example cluster && KVFERRY_FAULT_SEED={seed} \
                                 KVFERRY_FAULT_RUNS={runs} KVFERRY_FAULT_ONLY={run} cargo test --test random_faults\nor with: \
                                 cargo run --example cluster -- {command}",
                                began.elapsed().as_secs_f64()
                            );
                            eprintln!("{failure}\n");
                            if let Ok(mut failures) = failures.lock() {
                                failures.push(run);
                            }
                        }
                    }
                }
            });
        }
    });
    let (asked, happened) = (asked.into_inner(), happened.into_inner());
    let (requests, delivered) = (requests.into_inner(), delivered.into_inner());
    println!("{happened} of {asked} faults happened; {delivered} of {requests} requests were delivered");
    let failures = failures.into_inner().unwrap_or_default();
    assert!(failures.is_empty(), "runs {failures:?} of seed {seed} failed; the commands that reproduce them are above");
    // Otherwise this would test little.
    assert!(only.is_some() || 2 * happened > asked, "only {happened} of {asked} faults happened");
    assert!(only.is_some() || 4 * delivered > requests, "only {delivered} of {requests} requests were delivered");
}

/// One run.
struct Plan {
    options: Vec<String>,
    faults: u64,
}

impl Plan {
    fn draw(random: &mut Random) -> Plan {
        // (options, ranks); between two and four ranks on either side.
        const SIDES: [(&str, u64); 7] = [
            ("tp=2", 2),
            ("tp=1,groups=2", 2),
            ("pp=2,layers=3+1", 2),
            ("tp=1,groups=3", 3),
            ("tp=2,groups=2", 4),
            ("tp=4", 4),
            ("tp=2,pp=2", 4),
        ];
        let (prefill, sources) = *random.pick(&SIDES);
        let (decode, destinations) = *random.pick(&SIDES);
        let mut options: Vec<String> = ["--json", "--model", "tiny", "--deadline", "90"].map(String::from).into();
        let mut add = |option: &str, value: String| options.extend([option.to_owned(), value]);
        add("--prefill", prefill.to_owned());
        add("--decode", format!("{decode},order={}", random.pick(&["NHD", "HND"])));
        add("--transport", (*random.pick(&["shm", "tcp", "auto"])).to_owned());
        add("--direction", (*random.pick(&["pull", "push"])).to_owned());
        add("--requests", random.between(16, 40).to_string());
        add("--isl", random.between(200, 4000).to_string());
        add("--layers-per-step", random.between(1, 4).to_string());
        add("--silence", "1200".to_owned());
        add("--lease", "3000".to_owned());
        add("--seed", random.below(1000).to_string());
        // Without restarts a scheduler that is new would wait long for groups that it has never seen.
        let restart = random.below(4) > 0;
        let faults = random.between(1, 4);
        for _ in 0..faults {
            let target = match random.below(5) {
                0 if restart => "scheduler".to_owned(),
                pick if pick % 2 == 0 => format!("prefill:{}", random.below(sources)),
                _ => format!("decode:{}", random.below(destinations)),
            };
            let moment = match random.below(2) {
                0 => random.between(1, 16).to_string(),
                _ => format!("{}ms", random.below(700)),
            };
            match random.below(6) {
                0..3 => add("--kill", format!("{target}@{moment}")),
                3 => add("--stop", format!("{target}@{moment}")),
                4 => add("--pause", format!("{target}@{moment}")),
                _ => add("--pause", format!("{target}@{moment}+{}", random.between(10, 3000))),
            }
        }
        if restart {
            options.push("--restart".to_owned());
        }
        Plan { options, faults }
    }

    fn options(&self) -> Vec<&str> {
        self.options.iter().map(String::as_str).collect()
    }

    fn check(&self, ran: &Ran) {
        ran.check_sound();
        assert!(!ran.stderr.contains("panicked"), "{}\n{}", ran.command, ran.stderr);
    }
}

/// How many faults a run had no time for: it says so.
fn not_happened(ran: &Ran) -> u64 {
    let note = ran.stderr.lines().find(|line| line.contains("faults did not happen"));
    note.and_then(|line| line.split_whitespace().nth(1)).map_or(0, |count| count.parse().expect("a number"))
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(format!("KVFERRY_FAULT_{name}")).ok()?;
    Some(value.parse().expect("a KVFERRY_FAULT_ variable is a number"))
}

/// splitmix64: a seed says everything.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % limit
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
