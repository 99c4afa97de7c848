//! One rank's share of Llama-70B at tp 8, 8,192 tokens (81,920 pieces of 4 KiB), from GPU to GPU through all actors of three nodes in one process.
//!
//! usage: cargo bench -p kvferry-benches --bench gpu_handover [-- FROM TO]      numbers of GPUs, by default 0 and 1

use std::process::ExitCode;
use std::time::{Duration, Instant};

use kvferry::{Direction, TransportKind};
use kvferry_benches::{Error, Nodes};
use tokio::runtime::Builder;

const GEOMETRY: &str = "layers=80,kv_heads=1,head_dim=128,dtype=bf16";
const TOKENS: u64 = 8192;
const BYTES: u64 = TOKENS * 80 * 2 * 128 * 2;
const ROUNDS: usize = 200;

/// Median and 99th percentile.
fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |percent: usize| times.get(times.len() * percent / 100).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    format!("p50 {:.3} ms  p99 {:.3} ms", at(50), at(99))
}

async fn measure(direction: Direction, gpus: [&str; 2]) -> Result<(), Error> {
    let [from, to] = gpus;
    let mut nodes = Nodes::start(GEOMETRY, TransportKind::Cuda, direction, [Some(from), Some(to)]).await?;
    for _ in 0..20 {
        nodes.handover(TOKENS).await?;
    }
    let (mut whole, mut ready) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let finished = nodes.handover(TOKENS).await?;
        whole.push(start.elapsed());
        if !finished.outcome.is_delivered() {
            return Err(format!("{:?}", finished.outcome).into());
        }
        if let (Some(first), Some(last)) = (finished.ready_at, finished.settled_at) {
            ready.push(last.since(first));
        }
    }
    let direction = format!("{direction:?}").to_lowercase();
    println!("{direction} {from} to {to}, {BYTES} bytes: submit to outcome {}", quantiles(whole));
    println!("{direction} {from} to {to}, {BYTES} bytes: last layer ready to delivered {}", quantiles(ready));
    nodes.shutdown().await;
    Ok(())
}

fn main() -> ExitCode {
    // Cargo adds an option of its own.
    let numbers: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let gpu = |at: usize, default: &str| format!("gpu{}", numbers.get(at).map_or(default, String::as_str));
    let (from, to) = (gpu(0, "0"), gpu(1, "1"));
    let done = Builder::new_current_thread().enable_all().build().map_err(Error::from).and_then(|runtime| {
        [Direction::Pull, Direction::Push]
            .into_iter()
            .try_for_each(|direction| runtime.block_on(measure(direction, [&from, &to])))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_handover: {error}");
            ExitCode::FAILURE
        }
    }
}
