/** Stacks main -> run -> outer -> hot, compiled by C2 soon after the start. Runs until it is killed. */
final class Burn {
    private static long sink;

    private static long hot(long x, int rounds) {
        for (int i = 0; i < rounds; i++) {
            x = x * 6364136223846793005L + 1442695040888963407L;
        }
        return x;
    }

    private static void outer(int depth) {
        if (depth == 0) {
            sink = hot(sink, 500);
        } else {
            outer(depth - 1);
            sink++;
        }
    }

    private static void run() {
        while (true) {
            for (int i = 0; i < 1000; i++) {
                outer(20);
            }
        }
    }

    public static void main(String[] arguments) {
        System.out.println("ready");
        run();
    }
}
